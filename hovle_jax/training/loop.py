"""The loop: start or resume, step, log, save, stop. Reads from top to bottom as a run goes."""

import dataclasses
import itertools
import logging
import pathlib

import jax
import numpy as np

from hovle_jax.config import RunConfig
from hovle_jax.corpora import loading
from hovle_jax.data import pipeline
from hovle_jax.data.bad_samples import BadSamples, merge_bad_samples
from hovle_jax.data.text.tokenizer import has_tokenizer, load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.hosts import distributed
from hovle_jax.model.config import ExecutionConfig, HoVLEConfig
from hovle_jax.report.batch_images import batch_picture
from hovle_jax.training import checkpoint, layout_table, profiling
from hovle_jax.training.checks import accumulation, check, check_same_data_everywhere, check_tokenizer
from hovle_jax.training.monitor import Monitor
from hovle_jax.training.optimizer import learning_rate, make_optimizer
from hovle_jax.training.sharding import check_batch_shape, make_mesh, on_mesh, put_batch
from hovle_jax.training.stages import BATCH_KINDS, STAGES, Models
from hovle_jax.training.state import abstract_params, init_component, make_state, wholly_frozen
from hovle_jax.training.step import average, eval_step, train_step_for

HELD_OUT_BATCHES = 4

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Result:
    """What a run leaves behind for its report."""

    folder: pathlib.Path
    step: int
    finished: bool
    held_out: dict  # step -> metrics


def resolve_execution(execution: ExecutionConfig, platform, accumulate=1):
    """What 'auto' means on a platform: float32 on the CPU, where bfloat16 training is slow; its own attention."""
    meant = {
        "dtype": "float32" if platform == "cpu" else "bfloat16",
        "attention": {"tpu": "splash", "gpu": "cudnn", "cpu": "blocks"}.get(platform, "xla"),
    }
    meant = {name: value for name, value in meant.items() if getattr(execution, name) == "auto"}
    return dataclasses.replace(execution, accumulate=accumulate, **meant)


def get_tokenizer(config: RunConfig, folders, sources, corpus):
    """The tokenizer of one of these folders (the run's own, its sources'), the configured one, or one trained here."""
    place = next((place for place in (*folders, *sources) if has_tokenizer(place)), config.tokenizer.path)
    if place == "required":
        raise UserError(
            f"the preset {config.preset!r} reads text as its public LLM does, and {' and '.join(map(str, sources))} "
            "have no tokenizer; give that LLM's SentencePiece model with --config.tokenizer.path=FILE"
        )
    tokenizer = load_tokenizer(place) if place else pipeline.train_tokenizer(config, corpus)
    # A public LLM's has no image tokens.
    return tokenizer.with_image_tokens() if "embedding" in STAGES[config.stage].components else tokenizer


def load_params(models: Models, batch, mesh, sources, only=None):
    """Every parameter of the stage: from the runs in `sources` {component: folder}, else fresh.

    Args:
      only: names of components; None = all.
    """
    params = {}
    for component, abstract in abstract_params(models, batch, mesh).items():
        if only is not None and component not in only:
            continue
        if component not in sources:
            params[component] = init_component(models, component, batch, abstract)
        elif component == "teacher" and models.config.teacher.kind == "clip":
            params[component] = load_clip_teacher(sources[component], models, abstract)
        else:
            params[component] = checkpoint.load_component(sources[component], component, abstract)
    if "embedding" in params and "embedding" not in sources:
        copy_text_table(params, models.config.model)
        if models.config.init.pass_through:
            add_nothing(params["embedding"]["stack"])
    return params


def load_clip_teacher(folder, models, abstract):
    """A CLIP run's image tower without its last layer, whose patches the contrastive loss does not train."""
    total, used = models.config.teacher.vision.num_layers, models.config.teacher.num_layers
    vision = abstract["vision"]
    mesh = jax.tree.leaves(vision)[0].sharding.mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    stored = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((total, *leaf.shape[1:]), leaf.dtype, sharding=whole), vision["layers"]
    )
    tower = checkpoint.load_component(folder, "clip", {"vision": vision | {"layers": stored}})["vision"]
    layers = jax.tree.map(
        lambda leaf, target: jax.device_put(leaf[:used], target.sharding), tower["layers"], vision["layers"]
    )
    return {"vision": tower | {"layers": layers}}


def copy_text_table(params, model: HoVLEConfig):
    """A fresh holistic embedding starts with the LLM's token vectors as its text table, as far as there are any."""
    if "llm" not in params:
        return
    table = params["llm"]["token_embedding"]["embedding"][: model.llm.vocab_size]
    embedding, size = params["embedding"], model.embedding.vocab_size
    for name, rows in (("text_embedding", table[:size]), ("special_embedding", table[size:])):
        if name in embedding:
            fresh = embedding[name]["embedding"]
            rows = rows[: len(fresh)]
            # A copy also where all rows are replaced: the step donates its buffers.
            embedding[name] = {"embedding": jax.device_put(fresh.at[: len(rows)].set(rows), fresh.sharding)}


def add_nothing(stack):
    """Zeros in what ends the residual branches of a fresh stack, which then gives its input; they learn from there."""
    layers = stack["layers"]
    for name in ("output", "down"):
        layers[name] = jax.tree.map(
            lambda leaf: jax.device_put(jax.numpy.zeros_like(leaf), leaf.sharding), layers[name]
        )


def run(config: RunConfig, folder, sources, say=print, profile=None):
    """Trains one stage, from the beginning or from its newest checkpoint. Called on all hosts; the first one speaks.

    Args:
      folder: the run's own.
      sources: {component: folder of the run that it comes from}.
      profile: a range of steps to trace, or None.
    Returns:
      Result.
    Raises:
      UserError: see `check`; also a loss that is not finite.
    """
    # 1. Checks that need no device, then data: each host's own rows, planned alike on all of them.
    check(config)
    folder = checkpoint.open_run_folder(folder)
    checkpoint.check_same_config(folder, config)
    say = say if distributed.is_leader() else lambda line: None
    monitor = Monitor(config, folder, profile, say)
    mesh = make_mesh(config.mesh)
    check_batch_shape(config.data.batch_size, config.data.sequence_length, mesh)
    parts = accumulation(config, mesh)
    corpus = loading.load_corpus(config, config.data.split, say)
    tokenizer = get_tokenizer(config, [folder], list(sources.values()), corpus)
    check_tokenizer(config, tokenizer)
    numbers, lists_bad = distributed.host_rows(mesh, config.data.batch_size)
    dataset = pipeline.build_dataset(config, BATCH_KINDS[config.stage], tokenizer, corpus, numbers=numbers)
    held_out = held_out_batches(config, tokenizer, numbers, say)
    first = dataset[0]
    distributed.check_shared(folder)
    check_same_data_everywhere(dataset.found, tokenizer)

    # 2. The folder is a run from here on.
    if distributed.is_leader():
        checkpoint.check_same_data(folder, dataset.found)
        checkpoint.save_config(folder, config)
        tokenizer.save(folder)
        batch_picture(first, tokenizer.pieces, folder / "first_batch.png")
    bad = BadSamples(folder if lists_bad else None, config.bad_ceiling, host=jax.process_index())

    # 3. State.
    models = Models(config, resolve_execution(config.execution, mesh.devices.flat[0].platform, parts))
    optimizer = make_optimizer(config.optimizer, config.steps)
    saving = checkpoint.RunCheckpoints(folder, config.checkpoint_every, config.keep_checkpoints)
    with on_mesh(mesh, models.execution.zero), saving as saved:
        profiling.check_steps(profile, saved.latest or 0, config.last_step)
        if distributed.is_leader():
            bad.start(saved.latest or 0, dataset.found.bad, dataset.found.samples)
        distributed.wait("the folder is a run")
        shapes = shapes_of_whole(first, config.data.batch_size)
        state = make_state(models, load_params(models, shapes, mesh, sources), shapes, optimizer)
        say(describe(config, state, shapes))
        note_layout(folder, models, shapes, mesh)
        if dataset.found.summary:
            say(f"{config.stage}: {dataset.found.summary}")
        if saved.latest is not None:
            state = saved.restore(state)
            say(f"{config.stage}: resuming at step {saved.latest}")

        def save_model(state):
            # What was frozen whole may be narrowed: it is handed on as it came.
            frozen = load_params(models, shapes, mesh, sources, only=wholly_frozen(state.trained, state.frozen))
            checkpoint.save_run_model(folder, state.params | frozen, config)

        results = _train(config, state, models, optimizer, dataset, held_out, bad, mesh, saved, monitor, save_model)
    distributed.wait("the last bad sample is listed")
    if distributed.is_leader():
        merge_bad_samples(folder)
    return Result(folder, *results)


def _train(config, state, models, optimizer, dataset, held_out, bad, mesh, saved, monitor, save_model):
    """-> (step, whether the run is finished, held-out metrics)."""
    first_step, schedule = int(state.step), learning_rate(config.optimizer, config.steps)
    held_out = [put_batch(batch, mesh) for batch in held_out]
    tokens = tokens_per_step(dataset[0]) * config.data.batch_size // dataset.size
    results, train_step = {}, train_step_for(models, mesh)

    def evaluate(step):
        if held_out:
            with monitor.besides("evaluation"):
                metrics = [eval_step(state.params, batch, stage=config.stage, models=models) for batch in held_out]
                results[step] = average(metrics)
            monitor.write(step, {f"held_out/{name}": value for name, value in results[step].items()})

    with monitor.following(first_step, tokens, mesh.devices.flat):
        batches = dataset.iterate(first_step, config.workers, nobody_has=distributed.everyone_says)
        batches = prefetched(itertools.islice(batches, config.last_step - first_step), mesh)
        if first_step == 0:
            evaluate(0)
        for step, (batch, events, drawn) in enumerate(monitor.waits(batches), first_step):
            bad.add(events, drawn)
            with monitor.step(step) as note:
                state, metrics = train_step(state, batch, stage=config.stage, models=models, optimizer=optimizer)
                note(metrics)
            done = step + 1
            stops = done == config.last_step or distributed.told_to_end()
            if done % config.log_every == 0 or stops:
                monitor.line(done, learning_rate=float(schedule(step)))
            if config.eval_every and done % config.eval_every == 0 and not stops:
                evaluate(done)
            if done % config.checkpoint_every == 0 or stops:
                with monitor.besides("checkpoints"):
                    saved.save(done, state, force=stops)
            if stops:
                break
        done = int(state.step)
        finished = done >= config.steps
        if finished and config.steps not in results:
            evaluate(config.steps)
        with monitor.besides("checkpoints"):
            saved.wait()
            if finished:
                save_model(state)
        monitor.ended(done)
    return done, finished, results


def prefetched(batches, mesh):
    """(batch, *rest) -> (batch on the devices, *rest): each is put there while the step before it runs."""
    waiting = None
    for batch, *rest in batches:
        placed = put_batch(batch, mesh), *rest
        if waiting:
            yield waiting
        waiting = placed
    if waiting:
        yield waiting


def held_out_batches(config, tokenizer, numbers=None, say=print):
    """Batches of the stage's own loss on pictures that are never trained on; the later stages have benchmarks.

    Args:
      numbers: of the rows of each that this host makes; None = all.
    """
    corpus = held_out_corpus(config, say)
    if corpus is None:
        return []
    dataset = pipeline.build_dataset(
        config, BATCH_KINDS[config.stage], tokenizer, corpus, held_out=True, numbers=numbers
    )
    return [dataset[i] for i in range(HELD_OUT_BATCHES)]


def held_out_corpus(config, say=print):
    """Samples that are never trained on: those that data.held_out names, or a known corpus' own."""
    if config.data.held_out:
        data = dataclasses.replace(config.data, source=config.data.held_out)
        return loading.load_corpus(dataclasses.replace(config, data=data), "test", say)
    if config.data.source in loading.IN_MEMORY and config.stage in ("pretrain", "distill"):
        return loading.load_corpus(config, "test", say)
    return None


def tokens_per_step(batch):
    """Real tokens of a batch; for a contrastive one, its pairs' caption tokens."""
    return int(np.sum(batch["segment_ids"] > 0)) if "segment_ids" in batch else batch["tokens"].size


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes_of_whole(rows, batch_size):
    """The shapes of a global batch, from some of its rows."""
    return {name: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype) for name, array in rows.items()}


def note_layout(folder, models, batch, mesh):
    """Writes what lies where on the mesh into the run's folder, and says which rules of the table cannot apply."""
    if not distributed.is_leader():
        return
    lines, warnings = layout_table.describe(models, batch, mesh)
    (folder / layout_table.FILE_NAME).write_text("\n".join(lines) + "\n")
    for warning in warnings:
        log.warning(warning)


def describe(config, state, batch):
    """One line: what is trained, what is read, the batch."""
    shape = " x ".join(map(str, batch["tokens"].shape))
    return (
        f"{config.stage}: {count(state.trained):,} parameters trained, {count(state.frozen):,} frozen; "
        f"batch {shape} tokens, {config.steps} steps"
    )
