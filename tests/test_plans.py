"""Plans of epochs, and batch = f(seed, step) of any kind of file."""

import dataclasses
import pickle

import numpy as np
import pytest

from hovle_jax.corpora import loading
from hovle_jax.data import pipeline
from hovle_jax.data.files import storage
from hovle_jax.data.files.sources import open_source
from hovle_jax.data.images import Tiling
from hovle_jax.data.rows import indexed
from hovle_jax.data.rows.costs import costs_of
from hovle_jax.training.stages import STAGES
from tests import micro
from tests.source_files import ALL, COUNT, image_file, jsonl, quiet, reader_of, write_meta

pytestmark = pytest.mark.usefixtures("own_cache")


def config_of(source, stage="instruct", **data):
    data = dict(source=source, batch_size=4, sequence_length=160, tiles=6, max_tiles=4, augment=True) | data
    return micro.run_config(stage, data=data)


def dataset_of(config, **more):
    return pipeline.build_dataset(
        config, STAGES[config.stage].batch, micro.tokenizer(), loading.load_corpus(config, "train", quiet), **more
    )


def row_numbers(config, epochs):
    """Which of the planned rows come, epoch by epoch."""
    corpus, kind = loading.load_corpus(config, "train", quiet), STAGES[config.stage].batch
    plan, *_, reader = corpus.planned(config, kind, micro.tokenizer())
    rows, _ = corpus.rows(config, kind, micro.tokenizer())
    make = indexed.RowMaker(plan, corpus.entries, reader, kind.shape(config, micro.tokenizer()), augment=False)
    name = lambda row: row.arrays["tokens"].tobytes()
    seen = {name(make(r, np.random.default_rng(0))): r for r in range(len(plan))}
    return [[seen[name(rows[e * len(plan) + i])] for i in range(len(plan))] for e in range(epochs)]


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(path_of):
    config = config_of(path_of("jsonl"))
    first, second = row_numbers(config, 2)
    assert sorted(first) == sorted(second) == list(range(len(first))) and first != second
    plans = []
    for seed in (0, 1):
        corpus = loading.load_corpus(config, "train", quiet)
        plan, made_of, events, _ = corpus.planned(
            dataclasses.replace(config, seed=seed), STAGES[config.stage].batch, micro.tokenizer()
        )
        assert sorted(plan.record.tolist()) == list(range(COUNT)) and not events
        assert made_of.samples == COUNT and 0.3 < made_of.token_fill <= 1
        plans.append(plan.record.tolist())
    assert plans[0] != plans[1]


def test_a_step_far_ahead_is_found_without_those_before(path_of, monkeypatch):
    dataset = dataset_of(config_of(path_of("jsonl")))
    reads = []
    read = storage.read
    monkeypatch.setattr(storage, "read", lambda *args: reads.append(args) or read(*args))
    batch = dataset[1_000_000]
    assert batch["tokens"].shape == (4, 160) and len(reads) < 80
    assert (batch["loss_weights"] > 0).any(1).all()


def test_an_index_is_of_one_tokenizer_and_one_template(path_of):
    samples = reader_of()
    other = pipeline.train_tokenizer(
        micro.run_config("pretrain"), loading.load_corpus(config_of(path_of("text")), "train")
    )
    templated = type(other)(samples.tokenizer.model)
    templated.chat_template = "{{ messages[0]['content'] }}"
    changed = lambda **c: dataclasses.replace(samples, processor=dataclasses.replace(samples.processor, **c))
    keys = [s.index_key() for s in (samples, changed(tokenizer=other), changed(system="x"), reader_of("distill"))]
    assert keys[0] not in keys[1:] and reader_of("align").index_key() == keys[0]
    assert changed(tokenizer=templated)._vocabulary != samples._vocabulary
    assert reader_of(tiles=9, sequence_length=99).index_key() == keys[0]  # neither matters to the index


def test_an_index_made_by_processes_is_the_same(path_of, monkeypatch, tmp_path):
    source, samples = open_source(path_of("jsonl")), reader_of()
    alone = costs_of(source, samples, quiet)
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path))
    monkeypatch.setattr("hovle_jax.data.rows.costs.MANY", 0)
    monkeypatch.setattr("hovle_jax.data.rows.costs.CHUNK", 5)
    shared = costs_of(source, samples, quiet, workers=1)
    for field in dataclasses.fields(alone):
        np.testing.assert_array_equal(getattr(alone, field.name), getattr(shared, field.name))


# ---------------------------------------------------------------------------------------------------------------------
# batch = f(seed, step)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


STAGES_OF = [*((kind, "instruct") for kind in ALL if kind != "text"), ("text", "pretrain"),
             ("meta", "distill"), ("tar", "contrast"), ("array_record", "align")]  # fmt: skip


@pytest.mark.parametrize("kind, stage", STAGES_OF)
def test_batches_do_not_depend_on_hosts_or_on_where_a_run_was_resumed(kind, stage, path_of):
    config = config_of(path_of(kind), stage)
    dataset = dataset_of(config)
    assert not dataset.summary.bad
    expected = [batch for (batch, _, _), _ in zip(dataset.iterate(), range(6))]
    assert any((a != b).any() for a, b in zip(expected[0].values(), expected[1].values()))
    steps = np.random.default_rng(len(kind)).choice(6, 3, replace=False).tolist()
    for hosts in (1, 2, 4):
        parts = [dataset_of(config, numbers=numbers) for numbers in np.array_split(range(4), hosts)]
        for step in steps:
            made_by = [next(part.iterate(step))[0] for part in parts]
            assert_same(expected[step], {name: np.concatenate([p[name] for p in made_by]) for name in made_by[0]})
    assert_same(expected[steps[0]], dataset[steps[0]])


@pytest.mark.parametrize("kind, stage, hosts", [("meta", "instruct", 2), ("text", "pretrain", 1)])
def test_batches_do_not_depend_on_worker_processes(kind, stage, hosts, path_of):
    config = config_of(path_of(kind), stage)
    expected = dataset_of(config)
    rows = list(range(4))[(hosts - 1) * 4 // hosts :]
    part = dataset_of(config, numbers=rows).iterate(2, workers=2)
    for step in (2, 3, 4):
        assert_same({name: value[rows] for name, value in expected[step].items()}, next(part)[0])


def test_augmentation_is_what_the_entry_says_and_the_seed_draws(tmp_path):
    jsonl(tmp_path)
    entry = {"annotation": "rows.jsonl"}
    tiles = lambda **more: dataset_of(config_of(write_meta(tmp_path, a=entry | more), augment=False))[0]["tiles"]
    plain = tiles()
    changed = tiles(data_augment=True)
    assert plain.shape == changed.shape and (plain != changed).any()
    np.testing.assert_array_equal(tiles(data_augment=True), changed)
    np.testing.assert_array_equal(tiles(data_augment=False), plain)
    held_out, *_ = held_out_of(config_of(write_meta(tmp_path, a=entry | {"data_augment": True})))
    assert any(
        (held_out["tiles"][0, 0] == Tiling(32, 1, 4).cut(image)[0]).all() for image in map(decoded, range(COUNT))
    )


def held_out_of(config, **more):
    corpus, kind = loading.load_corpus(config, "train", quiet), STAGES[config.stage].batch
    return list(pipeline.build_held_out(config, kind, micro.tokenizer(), corpus, **more))


def rows_of(batches):
    """The rows that are not empty, as bytes."""
    return [tokens.tobytes() for b in batches for tokens, ids in zip(b["tokens"], b["segment_ids"]) if ids.any()]


def test_held_out_rows_come_once_in_the_files_order_whatever_the_seed(path_of):
    config = config_of(path_of("jsonl"))
    batches = held_out_of(config)
    size = config.data.batch_size
    assert all(len(b["tokens"]) == size for b in batches)
    rows = rows_of(batches)
    assert len(set(rows)) == len(rows) and -(-len(rows) // size) == len(batches)
    assert rows_of(held_out_of(dataclasses.replace(config, seed=5))) == rows
    assert (
        rows_of(held_out_of(dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=3)))) == rows
    )
    assert rows_of(held_out_of(dataclasses.replace(config, eval_rows=2))) == rows[:2]
    # Two hosts make them together; a loss over pairs of rows leaves out what does not fill a batch.
    halves = [held_out_of(config, numbers=range(h, size, 2)) for h in (0, 1)]
    assert sorted(rows_of(halves[0]) + rows_of(halves[1])) == sorted(rows)
    assert len(rows_of(held_out_of(config, may_fill=False))) == len(rows) // size * size


def decoded(i):
    from hovle_jax.data.images import decode_image

    return decode_image(image_file(i))


def test_an_entry_s_own_number_of_tiles_is_planned_with(tmp_path):
    jsonl(tmp_path)
    entries = {"few": {"annotation": "rows.jsonl", "max_dynamic_patch": 1}, "many": {"annotation": "rows.jsonl"}}
    config = config_of(write_meta(tmp_path, **entries))
    plan, *_ = loading.load_corpus(config, "train", quiet).planned(
        config, STAGES[config.stage].batch, micro.tokenizer()
    )
    assert set(plan.tiles[plan.entry == 0].tolist()) == {1} and max(plan.tiles[plan.entry == 1].tolist()) == 5
    batches = dataset_of(config).iterate()
    assert not any(events for _, events, _ in (next(batches) for _ in range(4)))


def test_a_plan_is_the_same_in_another_process(path_of):
    config = config_of(path_of("jsonl"))
    plan, *_ = loading.load_corpus(config, "train", quiet).planned(
        config, STAGES[config.stage].batch, micro.tokenizer()
    )
    copy = pickle.loads(pickle.dumps(plan))
    assert [copy.row(r) for r in range(len(copy))] == [plan.row(r) for r in range(len(plan))]
    assert indexed.EpochPlan(plan.key).key == plan.key
