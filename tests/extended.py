"""What the additions of docs/extending.md must do, in a copy of the project that has them (tests/test_extending.py).

python -m tests.extended FOLDER        prints {section: '' or what went wrong}
"""

import dataclasses
import json
import pathlib
import sys
import traceback

import jax
import numpy as np

from hovle_jax import train
from hovle_jax.config import MeshConfig, ModelConfig
from hovle_jax.corpora import loading
from hovle_jax.model.teacher_config import TeacherConfig
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.training import checks, loop
from hovle_jax.training.stages import STAGES
from hovle_jax.training.step import total_loss
from tests import micro

ROOT = pathlib.Path(__file__).parents[1]


def a_stage(folder):
    """It is planned, trains, resumes, hands on its result, and is lowered ahead of time; its FLOPs are counted."""
    from hovle_jax.aot.program import Program
    from hovle_jax.hardware import topology
    from hovle_jax.report.metrics import read_metrics

    config = train.stage_config(ROOT / "configs", "zloss", "tiny")
    checks.check(config)
    assert [c.stage for c, *_ in train.plan(config, ROOT / "configs", folder)] == ["zloss"]
    small = dataclasses.replace(micro.run_config("pretrain", steps=5, log_every=1, checkpoint_every=2), stage="zloss")
    loading.load_corpus = lambda config, split, say=print: micro.corpus()
    stopped = loop.run(dataclasses.replace(small, stop_at_step=2), folder / "zloss", {}, say=lambda line: None)
    result = loop.run(small, folder / "zloss", {}, say=lambda line: None)
    assert not stopped.finished and result.finished and (folder / "zloss" / "model" / "llm").is_dir()
    assert set(result.held_out[5]) == {"loss", "z_loss"}
    rows = read_metrics(folder / "zloss")
    assert any(row.get("model_flops_per_second", 0) > 0 for row in rows) and all(
        row["z_loss"] > 0 for row in rows if "loss" in row
    )
    assert STAGES["zloss"].step_flops(small).model == STAGES["pretrain"].step_flops(small).model
    run = micro.run(small, make_mesh(MeshConfig(data=1, fsdp=8)))
    assert "reduce_scatter" in Program(small, run, topology.find("v5e-8")).lower().as_text()


def a_teacher_tower(folder):
    """A student learns from a tower without a class token, in a step with the FLOPs that its patches have."""
    config = micro.run_config("distill")
    vision = micro.vision_tower(class_token=False, layer_scale=False)
    config = dataclasses.replace(config, teacher=TeacherConfig("patches", vision, projector="linear"))
    checks.check(config)
    state, batches, step = micro.start(config)
    tower = state.frozen["teacher"]["vision"]
    assert "class_embedding" not in tower and tower["layers"]["up"]["kernel"].shape[0] == vision.num_layers - 1
    losses = []
    for _ in range(4):
        state, metrics = step(state, batches[0])
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert STAGES["distill"].step_flops(config).parts["teacher"] > 0


def a_sharding_rule(folder):
    """The patches' kernel is sharded by tensor, and the loss is that of one device."""
    config, mesh = micro.run_config("instruct"), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    losses = []
    for run in (micro.run(config), micro.run(config, mesh)):
        params, batch = micro.params(config, run.placement.mesh), run.placement.put_batch(micro.dataset(config)[0])
        loss = jax.jit(lambda params, batch, run=run: total_loss(params, {}, batch, "instruct", run.models)[0])
        losses.append(float(loss(params, batch)))
    kernel = params["embedding"]["patch_embedding"]["kernel"]
    assert kernel.sharding.spec[0] == "tensor", kernel.sharding
    np.testing.assert_allclose(*losses, rtol=1e-4)


def a_benchmark(folder):
    """It is found by its name, asks a model, and leaves scores and predictions."""
    from hovle_jax.corpora import easy_vqa
    from hovle_jax.evaluation.benchmarks import evaluate
    from hovle_jax.evaluation.results import write_predictions
    from hovle_jax.training.weights import save_result

    config = micro.run_config("instruct")
    save_result(folder, STAGES["instruct"], micro.params(config), config)
    micro.tokenizer().save(folder)
    easy_vqa.load = lambda split: micro.examples()
    scored = evaluate(folder, "shapes", limit=6)
    assert scored.scores["questions"] == 6 and 0 <= scored.scores["accuracy"] <= 100
    write_predictions(folder / "predictions.jsonl", scored.answered)
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all("one word" not in row["question"] for row in rows)


def an_llm_family(folder):
    """Its folder is written, read back to the bit, and refused where it has what the row says is not supported."""
    from hovle_jax.conversion.exporting import export_model
    from hovle_jax.conversion.importing import import_checkpoint
    from hovle_jax.errors import UserError
    from tests.public_models import llm, made

    quiet = lambda line: None
    config = ModelConfig(llm=llm("mistral"))
    made(folder / "ours", config)
    export_model(folder / "ours", folder / "public", say=quiet)
    written = json.loads((folder / "public" / "config.json").read_text())
    assert written["model_type"] == "mistral" and written["architectures"] == ["MistralForCausalLM"]
    import_checkpoint(folder / "public", folder / "back", say=quiet)
    export_model(folder / "back", folder / "again", say=quiet)
    files = [(folder / name / "model.safetensors").read_bytes() for name in ("public", "again")]
    assert files[0] == files[1]
    (folder / "public" / "config.json").write_text(json.dumps(written | {"sliding_window": 8}))
    try:
        import_checkpoint(folder / "public", folder / "refused", say=quiet)
    except UserError as error:
        assert "sliding_window=8" in str(error)
    else:
        raise AssertionError("a sliding window was read past")


CHECKS = {
    "A stage of training": a_stage,
    "A teacher tower": a_teacher_tower,
    "A benchmark": a_benchmark,
    "A sharding rule": a_sharding_rule,
    "An LLM family": an_llm_family,
}


def main(folder):
    found = {}
    for number, (title, check) in enumerate(CHECKS.items()):
        place = pathlib.Path(folder) / str(number)
        place.mkdir(parents=True)
        try:
            check(place)
            found[title] = ""
        except Exception:  # noqa: BLE001 (the test shows it)
            found[title] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)
    main(sys.argv[1])
