"""The programs of a run, lowered and compiled from shapes alone: nothing is allocated, no device need be there."""

import math
import re
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.aot.remedies import remedies
from hovle_jax.aot.report import Report, read
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.hardware.chips import chip_of
from hovle_jax.hardware.topology import Topology
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.training.checks import check
from hovle_jax.training.setup import Run, build
from hovle_jax.training.stages import find
from hovle_jax.training.state import abstract_state
from hovle_jax.training.step import eval_step, train_step


class TooLarge(UserError):
    """A program needs more memory than a device has."""

    needed: float | None = None  # bytes, where the compiler tells them


def set_up(config: RunConfig, target: Topology) -> Run:
    """Raises UserError: see `checks.check`; also where the mesh and the batch do not fit, or without libtpu."""
    check(config)
    return build(config, make_mesh(config.mesh, target.devices()))


def arguments(config: RunConfig, run: Run, program: str = "train", new_tokens: int = 512) -> dict[str, Any]:
    """A program's arguments by name, in order: shapes with shardings, as `lower` takes them.

    Args:
      program: 'train' is the run's `train_step`; 'evaluation' its `eval_step`, over held-out rows; 'prefill' reads a
        batch of prompts of data.sequence_length tokens into empty caches, and 'decode' appends one token to each of its
        rows.
      new_tokens: room after the prompts in the caches.
    Raises:
      UserError: the stage gives no model that answers.
    """
    stage, placement, rows = find(config.stage), run.placement, config.data.batch_size
    params, shape = run.abstract_params(), jax.ShapeDtypeStruct
    of_rows = lambda sizes, dtype: shape((rows, *sizes), dtype, sharding=placement.batch_sharding)
    batch = {name: of_rows(np.shape(array), array.dtype) for name, array in stage.batch.empty_row(config).items()}
    state = abstract_state(stage, run, params)
    if program == "train":
        return {"state": state, "batch": batch}
    if program == "evaluation":
        return {"params": state.params, "batch": batch}
    if not {"embedding", "llm"} <= set(stage.result):
        raise UserError(f"a run of {config.stage} gives no model that answers; take the config of another stage")
    hovle = run.models.hovle
    capacities = [batch[name].shape[1] + new_tokens for name in ("tokens", "long_tokens") if name in batch]
    cache = jax.eval_shape(lambda: hovle.empty_cache(rows, capacities[0], capacities[-1], hovle.execution.dtype))
    cache = cache if program == "prefill" else cache.begun()
    placed = lambda leaf, sharding: shape(leaf.shape, leaf.dtype, sharding=sharding)
    cache = jax.tree.map(placed, cache, placement.cache_shardings(cache))
    new = {"batch": batch} if program == "prefill" else {"token": of_rows((), jnp.int32), "active": of_rows((), bool)}
    return {"params": params, **new, "cache": cache}


def lower(config: RunConfig, run: Run, program: str, given: dict[str, Any]) -> jax.stages.Lowered:
    """The program as it would run on the mesh's devices, with these `arguments`."""
    if program == "train":
        return train_step.lower(*given.values(), stage=config.stage, run=run)
    if program == "evaluation":
        return eval_step.lower(*given.values(), stage=config.stage, run=run)
    step = getattr(run.models.hovle, program)
    return jax.jit(step, donate_argnums=len(given) - 1).lower(*given.values())


def beside(config: RunConfig, run: Run, program: str, sizes: dict[str, int]) -> dict[str, int]:
    """What a run holds while the program runs, beside its arguments of these sizes: {what: bytes of a device}."""
    if program == "train":
        return {"the next batch": sizes["batch"]}
    if program == "evaluation":
        state = abstract_state(find(config.stage), run, run.abstract_params())
        return {"moments": _bytes_of_a_device(state.opt_state), "a batch to train on": sizes["batch"]}
    return {}


def compile_for(
    config: RunConfig, target: Topology, program: str = "train", new_tokens: int = 512, with_forecast: bool = True
) -> Report:
    """Compiles and reads the program.

    Raises:
      TooLarge: it does not fit; the message has the size and what takes less.
      UserError: see `set_up` and `arguments`.
    """
    started = time.perf_counter()
    run = set_up(config, target)
    given = arguments(config, run, program, new_tokens)
    sizes = {name: _bytes_of_a_device(tree) for name, tree in given.items()}
    held = beside(config, run, program, sizes)
    options = run.compiler_options() if program == "train" else {}
    try:
        with warnings.catch_warnings():  # what is compiled for absent devices cannot be read from jax's cache
            warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
            compiled = lower(config, run, program, given).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _too_large(config, run, target, program, sizes, held, str(error)) from None
    return read(compiled, config, run, target, program, sizes, held, time.perf_counter() - started, with_forecast)


def _too_large(config, run, target, program, sizes, held, text):
    needed, available = _sizes(text)
    told = f"{needed / 1e9:.1f} GB of {available / 1e9:.1f} GB a device" if needed else "more memory than a device has"
    told += "".join(f", with {what} of {size / 1e9:.1f} GB beside it" for what, size in held.items())
    available = available or chip_of(target.generation).hbm_bytes / target.kind.devices_per_chip
    ways = remedies(config, run, target, program, needed or math.inf, available, sizes, held)
    ways = "; ".join(ways) or "nothing that a flag could change"
    what = f"{config.stage}:{config.preset} {program} on {target.name}"
    too_large = TooLarge(f"{what} needs {told}. What takes less: {ways}")
    too_large.needed = needed
    return too_large


def _bytes_of_a_device(tree):
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _sizes(text):
    """Bytes needed and available, from the compiler's message; (None, None) without.

    "Used 20.52G of 15.75G hbm", or "... HLO temporaries (107.55G) exceeds available HBM (15.75G)".
    """
    size = r"([\d.]+[KMGT]?)"
    found = re.search(rf"Used {size} of {size} hbm|\({size}\) exceeds available HBM \({size}\)", text)
    bytes_of = lambda text: float(text.rstrip("KMGT")) * 2 ** (10 * " KMGT".find(text[-1]) if text[-1] in "KMGT" else 0)
    return tuple(bytes_of(group) for group in found.groups() if group) if found else (None, None)
