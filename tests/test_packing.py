"""Packing: budgets, fill, and the same losses and gradients as one sample a row."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from hovle_jax.corpora import loading
from hovle_jax.data import pipeline
from hovle_jax.data.batch import WEIGHTINGS
from hovle_jax.data.rows.packing import WINDOW, pack
from hovle_jax.errors import UserError
from hovle_jax.training import loop
from hovle_jax.training.stages import STAGES
from tests import micro
from tests.benchmarks.packing import corpus


def check(packing, tokens, tiles, max_tokens, max_tiles):
    assert sorted(packing.members.tolist()) == list(range(len(tokens)))
    for row in range(len(packing)):
        members = packing.row(row)
        assert len(members) and tokens[members].sum() <= max_tokens and tiles[members].sum() <= max_tiles


@pytest.mark.parametrize("seed", range(3))
def test_a_mixed_corpus_fills_rows(seed):
    tokens, tiles = corpus(5000, seed)
    packing = pack(tokens, tiles, 16_384, 44)
    check(packing, tokens, tiles, 16_384, 44)
    assert tokens.sum() / (len(packing) * 16_384) >= 0.95
    assert tiles.sum() / (len(packing) * 44) >= 0.90


@pytest.mark.parametrize("seed", range(20))
def test_any_corpus_is_packed_within_its_budgets(seed):
    rng = np.random.default_rng(seed)
    n, max_tokens, max_tiles = int(rng.integers(1, 3000)), int(rng.integers(1, 200)), int(rng.integers(0, 9))
    tokens, tiles = rng.integers(1, max_tokens + 1, n), rng.integers(0, max_tiles + 1, n)
    packing = pack(tokens, tiles, max_tokens, max_tiles)
    check(packing, tokens, tiles, max_tokens, max_tiles)
    few = pack(tokens, tiles, max_tokens, max_tiles, max_samples=2)
    check(few, tokens, tiles, max_tokens, max_tiles)
    assert max(len(few.row(r)) for r in range(len(few))) <= 2
    assert len(pack(tokens, tiles, max_tokens, max_tiles, max_samples=1)) == n


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_hardly_more_than_what_they_hold_needs(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 4000))
    tokens, tiles = rng.integers(1, 101, n), rng.integers(0, 9, n)
    assert len(pack(tokens, tiles, 100, 8)) < 1.35 * max(tokens.sum() / 100, tiles.sum() / 8) + 2


def test_no_sample_waits_for_long():
    tokens = np.random.default_rng(0).integers(1, 50, 20_000)
    packing = pack(tokens, np.zeros(20_000, int), 100, 0)
    assert np.abs(packing.members - np.arange(20_000)).max() < 4 * WINDOW


def write_corpus(folder):
    """12 conversations with 0 to 2 images."""
    rng, rows = np.random.default_rng(0), []
    for i in range(12):
        count = i % 3
        for k in range(count):
            side = (int(rng.integers(20, 90)), int(rng.integers(20, 90)))
            Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8)).save(folder / f"{i}_{k}.png")
        turns = []
        for turn in range(1 + i % 2):
            answer = " ".join(["a red circle", "yes", "no", "a teal shape"][(i + turn) % 4 :])
            turns += [{"from": "human", "value": "is it? " * (1 + turn)}, {"from": "gpt", "value": answer}]
        turns[0]["value"] = "<image>\n" * count + turns[0]["value"]
        rows.append({"id": i, "image": [f"{i}_{k}.png" for k in range(count)], "conversations": turns})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def epoch(config):
    """All rows of an epoch as one batch."""
    corpus = loading.load_corpus(config, "train")
    plan, *_ = corpus.planned(config, STAGES[config.stage].batch, micro.tokenizer())
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=len(plan)))
    return pipeline.build_dataset(config, STAGES[config.stage].batch, micro.tokenizer(), corpus)[0]


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    return write_corpus(tmp_path / "data")


def run_config(source, stage="instruct", variant="pre", **data):
    data = dict(source=source, sequence_length=320, tiles=14, max_tiles=4, augment=False) | data
    return micro.run_config(stage, variant, data=data)


def sample_losses(config, variant, batch):
    """{the sample's targets: its weighted loss}, gradients of the whole, (sum, weight)."""
    models, params = micro.models(config), micro.params(micro.run_config(config.stage, variant))

    def total(params):
        (pair,) = STAGES[config.stage].losses(models, params, batch).values()
        return pair[0] / pair[1], pair

    grads, pair = jax.jit(jax.grad(total, has_aux=True))(params)
    logits = np.asarray(jax.jit(models.hovle.logits)(params, batch), np.float64)
    logits -= logits.max(-1, keepdims=True)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    found = {}
    for row in range(len(losses)):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            weights = batch["loss_weights"][row][here]
            assert weights.any()
            name = (*batch["tokens"][row][here], *batch["targets"][row][here])
            found.setdefault(name, []).append(float((losses[row][here] * weights).sum() / weights.sum()))
    return found, grads, pair


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "variant, weighting", [("pre", "square"), pytest.param("post", "sample", marks=pytest.mark.slow)]
)
def test_packed_samples_have_the_losses_and_gradients_of_rows_of_their_own(source, variant, weighting):
    config = run_config(source, variant=variant, loss_weights=weighting)
    alone = run_config(source, variant=variant, loss_weights=weighting, samples_per_row=1)
    packed_batch, alone_batch = epoch(config), epoch(alone)
    assert len(alone_batch["tokens"]) == 12 and len(packed_batch["tokens"]) < 7
    packed, packed_grads, packed_pair = sample_losses(config, variant, packed_batch)
    single, grads, pair = sample_losses(alone, variant, alone_batch)
    assert packed.keys() == single.keys()
    for name, losses in single.items():
        np.testing.assert_allclose(sorted(packed[name]), sorted(losses), atol=1e-5)
    np.testing.assert_allclose(packed_pair, pair, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), packed_grads, grads)


def test_weights_of_samples_sum_as_they_should(source):
    totals = {}
    for weighting in WEIGHTINGS:
        batch = epoch(run_config(source, loss_weights=weighting))
        rows, columns = np.nonzero(batch["loss_weights"])
        places = {}
        for row, column in zip(rows, columns):
            places.setdefault((row, batch["segment_ids"][row, column]), []).append(batch["loss_weights"][row, column])
        assert len(places) == 12
        totals[weighting] = [(len(weights), sum(weights)) for weights in places.values()]
    assert all(total == count for count, total in totals["token"])
    np.testing.assert_allclose([total for _, total in totals["sample"]], 1, rtol=1e-6)
    np.testing.assert_allclose([t for _, t in totals["square"]], [n**0.5 for n, _ in totals["square"]], rtol=1e-6)


def test_distillation_is_packed_too(source):
    config = run_config(source, "distill", sequence_length=256, random_tokens=6)
    corpus = loading.load_corpus(config, "train")
    plan, summary, events, _ = corpus.planned(config, STAGES[config.stage].batch, micro.tokenizer())
    assert summary.samples == 8 and len(plan) < 8  # those with an image
    assert not events and "4 left out (no_image)" in str(summary)
    batch = pipeline.build_dataset(config, STAGES[config.stage].batch, micro.tokenizer(), corpus)[0]
    assert batch["segment_ids"].max() > 1
    per_segment = [
        batch["text_weights"][row][batch["segment_ids"][row] == segment].sum()
        for row in range(len(batch["tokens"]))
        for segment in range(1, batch["segment_ids"][row].max() + 1)
    ]
    assert set(per_segment) == {12.0}


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_does_not_go_on_with_other_data(source, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "save_result", lambda *_: None)
    config = run_config(source, "pretrain", sequence_length=64, tiles=1)
    rows = [{"text": f"is there a {word} shape? yes."} for word in ("red", "blue", "teal", "gray", "green")]
    path = tmp_path / "data" / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(path), batch_size=8), steps=2)
    quiet = lambda _: None
    loop.run(dataclasses.replace(config, stop_at_step=1), tmp_path / "run", {}, say=quiet)
    (tmp_path / "elsewhere").mkdir()
    path = path.rename(tmp_path / "elsewhere" / "text.jsonl").rename(path)  # another time, the same rows
    path.write_text(path.read_text() + json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(UserError, match="5 samples then, 6 now.*another --workdir"):
        loop.run(config, tmp_path / "run", {}, say=quiet)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert loop.run(config, tmp_path / "run", {}, say=quiet).step == 2
