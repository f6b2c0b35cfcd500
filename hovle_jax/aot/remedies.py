"""What to do about a program that does not fit, the cheapest first."""

import dataclasses

from hovle_jax.aot.estimate import estimate
from hovle_jax.config import RunConfig
from hovle_jax.errors import UserError
from hovle_jax.hardware.topology import larger
from hovle_jax.model.transformer import REMAT_POLICIES

REMATS = tuple(REMAT_POLICIES)  # what keeps most first


def remedies(config: RunConfig, run, target, program, count=3):
    """Sentences with the flags to give and what they cost.

    Args:
      run: as the program was lowered for; target: a `target.Target`.
    """
    if program != "train":
        return _for_inference(config, target)[:count]
    now = estimate(config, target)
    priced = []
    for flags, changed in _changes(config, run):
        try:
            then = estimate(changed, target)
        except UserError:
            continue  # mesh or batch do not divide so
        if then.memory < now.memory:
            slower = then.bounds.seconds / now.bounds.seconds
            priced.append((slower, -then.memory, f"{flags} ({_cost(slower)}, about {then.memory / 1e9:.1f} GB)"))
    sentences = [sentence for *_, sentence in sorted(priced)]
    return [*sentences, *_more_chips(target)][:count]


def _changes(config: RunConfig, run):
    """[(flags, the config with them)] of what takes less memory."""
    e, made = config.execution, []
    execution = lambda **values: dataclasses.replace(config, execution=dataclasses.replace(e, **values))
    if e.accumulate != -1:
        made.append(("--config.execution.accumulate=-1", execution(accumulate=-1)))
        twice = 2 * run.accumulate
        made.append((f"--config.execution.accumulate={twice}", execution(accumulate=twice)))
    for remat in REMATS[REMATS.index(e.remat) + 1 :]:
        made.append((f"--config.execution.remat={remat}", execution(remat=remat)))
    if not e.vocab_chunk or e.vocab_chunk > 8192:
        made.append(("--config.execution.vocab_chunk=8192", execution(vocab_chunk=8192)))
    if e.zero < 3:
        made.append(("--config.execution.zero=3", execution(zero=3)))
    for axis in ("tensor", "sequence"):
        size = 2 * getattr(config.mesh, axis)
        mesh = dataclasses.replace(config.mesh, **{axis: size})
        made.append((f"--config.mesh.{axis}={size}", dataclasses.replace(config, mesh=mesh)))
    return made


def _for_inference(config, target):
    rows, size = config.data.batch_size // 2, 2 * config.mesh.tensor
    fewer = [f"--config.data.batch_size={rows} (half of the rows at a time)"] if rows else []
    return [*fewer, f"--config.mesh.tensor={size} (weights and caches cut further)", *_more_chips(target)]


def _more_chips(target):
    more = larger(target.topology)
    return [f"--topology {more.cloud_name} ({more.chips} chips instead of {target.topology.chips})"] if more else []


def _cost(slower):
    return "no slower" if slower < 1.005 else f"{slower - 1:.0%} slower"
