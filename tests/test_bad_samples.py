"""Bad samples: each is named with a reason, replaced by rule, counted against the ceiling; odd images are none."""

import dataclasses
import io
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

from hovle_jax.corpora import loading
from hovle_jax.data import pipeline
from hovle_jax.data.bad_samples import (
    BadEvent,
    BadSample,
    BadSamples,
    count_reasons,
    merge_bad_samples,
    read_bad_samples,
)
from hovle_jax.data.files.records import parse, sizes_of
from hovle_jax.data.images import decode_image, image_size
from hovle_jax.errors import UserError
from hovle_jax.evaluation import summary
from hovle_jax.training import loop
from hovle_jax.training.stages import STAGES
from tests import broken, micro

pytestmark = pytest.mark.usefixtures("quick_compilation", "own_cache")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, own_cache):
    """(path of a jsonl, {sample's name: Broken}), of which nothing is indexed in another folder."""
    return broken.write_jsonl(tmp_path_factory.mktemp("corpus"))


def config_of(source, stage="instruct", **changes):
    data = dict(source=str(source), batch_size=8, sequence_length=192, tiles=5, max_tiles=4, augment=True)
    return micro.run_config(stage, data=data, **({"bad_ceiling": 1.0} | changes))


def dataset_of(config):
    return pipeline.build_dataset(
        config, STAGES[config.stage].batch, micro.tokenizer(), loading.load_corpus(config, "train", quiet)
    )


def quiet(line):
    pass


def epoch_events(config):
    """What an epoch finds: {sample's name: BadEvent}."""
    plan, *_ = loading.load_corpus(config, "train", quiet).planned(
        config, STAGES[config.stage].batch, micro.tokenizer()
    )
    dataset = dataset_of(config)
    batches = dataset.iterate()
    drawn = [event for _ in range(-(-len(plan) // 8)) for event in next(batches)[1]]
    return {event.sample: event for event in [*dataset.summary.bad, *drawn]}


def assert_same_batches(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# A run


def random_params(config, run, sources, only=None):
    """In place of `loop.load_params`: compiling the real initialisation takes longer than the run."""
    rng, abstract = np.random.default_rng(0), run.abstract_params()
    abstract = {component: tree for component, tree in abstract.items() if only is None or component in only}
    return jax.tree.map(lambda a: jax.device_put(rng.normal(size=a.shape).astype(a.dtype) / 10, a.sharding), abstract)


@pytest.fixture
def quick_start(monkeypatch):
    monkeypatch.setattr(loop, "load_params", random_params)


def with_tokenizer(config, folder):
    """The micro tokenizer instead of one that the run would train on its few texts."""
    folder.mkdir()
    micro.tokenizer().save(folder)
    return dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, path=str(folder)))


@pytest.mark.slow
def test_a_corpus_of_broken_samples_trains_to_the_end(corpus, quick_start, tmp_path):
    """An epoch, killed and resumed: one test, as it compiles for the time of all others together."""
    path, found = corpus
    config = with_tokenizer(config_of(path, steps=9, log_every=1, checkpoint_every=3), tmp_path / "tokenizer")
    result = loop.run(config, tmp_path / "whole", {}, say=quiet)
    assert (result.step, result.finished) == (9, True)
    each_kind_is_listed_with_its_reason(tmp_path / "whole", found)
    summary.summarize(config, result, None)
    the_report_counts_and_names_them(tmp_path / "whole", found)
    a_resumed_run_replaces_and_lists_the_same(config, tmp_path / "whole", tmp_path / "cut")


def each_kind_is_listed_with_its_reason(folder, found):
    events = read_bad_samples(folder)
    assert len({kind.name for kind in found.values()}) >= 90
    reasons = {}
    for event in events:
        reasons.setdefault(event.sample, set()).add(event.reason)
    for sample, kind in found.items():
        assert len(reasons.get(sample, ())) == 1 and reasons[sample] <= set(kind.reasons), kind.name
    assert reasons.keys() == found.keys()
    assert {event.shard.rpartition("/")[2] for event in events} == {"rows.jsonl"}
    drawn = [event for event in events if event.step >= 0]
    assert len({event.sample for event in drawn}) > 20  # those that state their size
    assert all(event.replaced_by.startswith("line at byte") for event in drawn)
    assert not {event.replaced_by for event in drawn} & found.keys()
    assert all(not event.replaced_by for event in events if event.step < 0)


def the_report_counts_and_names_them(folder, found):
    counts = count_reasons(read_bad_samples(folder))
    assert sum(counts.values()) == len(found)
    results = json.loads((folder / "results.json").read_text())
    assert {name.removeprefix("bad samples: "): n for name, n in results.items() if "bad" in name} == counts
    page = (folder / "report.html").read_text()
    assert f"{len(found)} samples" in page
    for sample, kind in found.items():
        assert f"rows.jsonl: {sample}<" in page, kind.name


def a_resumed_run_replaces_and_lists_the_same(config, whole, cut):
    # As a kill after step 6 leaves it: a list with steps that happen again, the last one written in part.
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "9")
    shutil.rmtree(cut / "model")
    with (cut / "bad_samples.jsonl").open("a") as file:
        file.write('{"step": 8, "sour')
    said = []
    loop.run(config, cut, {}, say=said.append)
    assert "instruct: resuming at step 6" in said
    lines = (whole / "bad_samples.jsonl").read_text().splitlines()
    assert (cut / "bad_samples.jsonl").read_text().splitlines() == lines
    assert len(set(lines)) == len(lines) > 90
    losses = lambda folder: [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
    assert losses(cut) == losses(whole)


@pytest.mark.slow
def test_worker_processes_hosts_and_a_new_index_replace_the_same(corpus, tmp_path, monkeypatch):
    config = config_of(corpus[0])
    expected = [batch for batch, _ in zip(dataset_of(config).iterate(), range(8))]
    in_workers = dataset_of(config).iterate(2, workers=2)
    for (batch, events, drawn), got in zip(expected[2:6], in_workers):
        assert_same_batches(batch, got[0])
        assert (events, drawn) == got[1:]
    # Nothing is known beforehand, and two hosts.
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path))
    corpus = loading.load_corpus(config, "train", quiet)
    halves = np.array_split(range(config.data.batch_size), 2)
    parts = [
        pipeline.build_dataset(config, STAGES[config.stage].batch, micro.tokenizer(), corpus, numbers=rows).iterate(3)
        for rows in halves
    ]
    for batch, events, drawn in expected[3:5]:
        made = [next(part) for part in parts]
        whole = {name: np.concatenate([part[0][name] for part in made]) for name in batch}
        assert_same_batches(batch, whole)
        assert events == made[0][1] + made[1][1] and drawn == made[0][2] + made[1][2]


@pytest.mark.parametrize("write", [broken.write_tar, broken.write_array_record, broken.write_parquet])
def test_every_kind_is_listed_whatever_the_format(write, tmp_path):
    if write is broken.write_parquet:
        pytest.importorskip("pyarrow")
    path, found = write(tmp_path)
    events = epoch_events(config_of(path))
    for sample, kind in found.items():
        assert sample in events, kind.name
        assert events[sample].reason in kind.reasons, kind.name
    assert events.keys() == found.keys()


@pytest.mark.parametrize("stage, reasons", [
    ("pretrain", {"no_text"}), ("contrast", {"no_caption"}), ("distill", {"not_an_image"}),
])  # fmt: skip
def test_the_other_stages_live_with_the_same_corpus(corpus, stage, reasons):
    path, found = corpus
    config = config_of(path, stage)
    if stage == "pretrain":  # which finds nothing to learn there but two texts
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=1))
    dataset = dataset_of(config)
    batch, events, _ = next(dataset.iterate())
    assert len(batch["tokens"]) == config.data.batch_size
    assert reasons <= {event.reason for event in dataset.summary.bad}
    assert len({event.reason for event in dataset.summary.bad}) > 8
    # Text alone is no fault where images are learned from: it is left out, and no bad sample.
    assert ("left out (no_image)" in dataset.summary.text) == (stage in ("contrast", "distill"))
    assert "no_image" not in {event.reason for event in dataset.summary.bad}


# ---------------------------------------------------------------------------------------------------------------------
# The lists of several hosts


@pytest.mark.parametrize("begins_again", [False, True], ids=["merged", "started again"])
@pytest.mark.parametrize("done", range(5))
def test_a_kill_while_lists_are_merged_doubles_and_loses_no_entry(done, begins_again, tmp_path, monkeypatch):
    """Killed after so many changes of the folder."""

    class Killed(BaseException):
        pass

    event = lambda step, host: BadEvent(step, "s", "a.tar", "same", "truncated_image", "", f"of host {host}")
    expected = []
    for host in range(3):
        for step in (0, 0, 1):  # a sample may be drawn twice for a batch, and be replaced by the same one
            BadSamples(tmp_path, 1.0, host=host).add([event(step, host)], 8)
            expected.append(event(step, host))
    expected.sort(key=lambda event: event.step)
    left = [None] * done
    with monkeypatch.context() as patch:
        for owner, name in ((pathlib.Path, "unlink"), (pathlib.Path, "replace"), (os, "replace")):
            change = getattr(owner, name)
            patch.setattr(owner, name, lambda *to, change=change: change(*to) if left and not left.pop() else killed())

        def killed():
            raise Killed

        try:
            merge_bad_samples(tmp_path)
        except Killed:
            assert not left
        assert read_bad_samples(tmp_path) == expected
    if begins_again:
        BadSamples(tmp_path, 1.0).start(1, [], 100)
        expected = [event for event in expected if event.step < 1]
    else:
        merge_bad_samples(tmp_path)
    assert read_bad_samples(tmp_path) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["bad_samples.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# The ceiling


def test_too_many_bad_samples_stop_a_run_before_its_first_step(corpus, tmp_path):
    path, found = corpus
    config = dataclasses.replace(config_of(path), bad_ceiling=0.01)
    with pytest.raises(UserError, match=r"\d+ of 218 samples cannot be used, more than bad_ceiling=0.01") as raised:
        loop.run(config, tmp_path, {}, say=quiet)
    message = str(raised.value)
    listed = read_bad_samples(tmp_path)
    assert f"rows.jsonl ({len(listed)})" in message and "missing_image" in message
    assert str(tmp_path / "bad_samples.jsonl") in message and "raise the ceiling" in message
    assert 60 < len(listed) < len(found)


def test_too_many_bad_samples_stop_a_run_when_they_are_drawn(tmp_path):
    """All of them state their sizes, so that nothing is known before they are decoded."""
    event = lambda n, shard: BadEvent(n, "s", shard, str(n), "truncated_image", "")
    bad = BadSamples(tmp_path, 0.01)
    bad.start(0, [], 10_000)
    for step in range(10):
        bad.add([event(step, "a.tar")], 10)
    with pytest.raises(UserError) as raised:
        bad.add([event(10, "b.tar")], 10)
    assert "11 of 110 samples cannot be used" in str(raised.value)
    assert "truncated_image 11; most are in a.tar (10), b.tar (1)" in str(raised.value)
    assert len(read_bad_samples(tmp_path)) == 11
    many = BadSamples(None, 0.01)
    for step in range(100):
        many.add([event(step, "a.tar")] if step % 2 else [], 100)  # half a percent


def test_a_run_stops_at_the_ceiling_while_it_trains(tmp_path, quick_start):
    kinds = [k for k in broken.broken_samples(rows=False) if k.name.endswith("_of_stated_size")]
    rows = [json.dumps(kind.row) for kind in kinds] + [json.dumps(broken.good_row(i * 6)) for i in range(6)]
    broken.write_jsonl(tmp_path, good=40)
    (tmp_path / "stated.jsonl").write_text("\n".join(rows))
    config = config_of(tmp_path / "stated.jsonl", bad_ceiling=0.01, steps=8)
    config = with_tokenizer(config, tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"\d+ of \d+ samples cannot be used.*most are in .*stated.jsonl \(\d+\)"):
        loop.run(config, tmp_path / "run", {}, say=quiet)
    events = read_bad_samples(tmp_path / "run")
    assert len(events) > 10 and all(event.step >= 0 for event in events)


def test_a_batch_without_a_supervised_token_is_an_error(tmp_path):
    """Images that state their sizes and are all broken leave nothing in any place."""
    row = json.dumps(broken.asked(image="none.png", width=32, height=32)) + "\n"
    (tmp_path / "rows.jsonl").write_text(row * 20)
    batches = dataset_of(config_of(tmp_path / "rows.jsonl")).iterate()
    with pytest.raises(UserError, match=r"batch of step 0 has no supervised token \(missing_image\)"):
        next(batches)


def test_a_corpus_without_a_good_sample_says_what_is_wrong_with_the_first(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": \n' * 20)
    with pytest.raises(
        UserError, match="none of the samples .* gives batches of conversations; the first: broken_json"
    ):
        dataset_of(config_of(tmp_path / "rows.jsonl"))


def test_a_mended_image_is_used_though_the_rows_stay_the_same(tmp_path):
    rows = [broken.asked(image=f"{i}.png") for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(broken.encoded(i))
    config = config_of(tmp_path / "rows.jsonl")
    (event,) = dataset_of(config).summary.bad
    assert event.reason == "missing_image"
    (tmp_path / "3.png").write_bytes(broken.encoded(3))
    dataset = dataset_of(config)
    assert not dataset.summary.bad and "4 samples" in dataset.summary.text


def test_names_that_no_file_takes_are_written(tmp_path):
    event = BadSample("empty_row", "it has \ud83d and \u2028")
    bad = BadSamples(tmp_path, 1.0)
    bad.start(0, [BadEvent(-1, "s", "a.jsonl", "line\u2028at\x85byte 0", event.reason, event.detail)], 1)
    (read,) = read_bad_samples(tmp_path)
    assert read.detail == "it has \\ud83d and" and read.sample == "line\u2028at\x85byte 0"


def test_what_is_no_image_s_file_is_neither_waited_for_nor_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "film").open("wb") as file:
        file.truncate(2**36)
    for name, reason in (("pipe", "unreadable_image"), ("film", "unreadable_image")):
        record = parse(broken.asked(image=name), str(tmp_path))
        with pytest.raises(BadSample, match=reason):
            sizes_of(record)


# ---------------------------------------------------------------------------------------------------------------------
# Images that are odd and whole


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", broken.odd_images())
def test_an_odd_image_is_what_pillow_makes_of_its_first_frame(name):
    data = broken.odd_images()[name]
    expected = Image.open(io.BytesIO(data))
    if name == "turned_by_exif":
        plain = decode_image(data, upright=False)
        np.testing.assert_array_equal(plain, expected.convert("RGB"))
        assert plain.size == image_size(data, upright=False) == (32, 20)
        expected = ImageOps.exif_transpose(expected)
        assert expected.size == (20, 32)
    made = decode_image(data)
    assert made.mode == "RGB" and made.size == image_size(data)
    np.testing.assert_array_equal(np.asarray(made), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_each_orientation_is_turned_upright(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = broken.encoded(1, format, size=(24, 16), exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    made = decode_image(data)
    assert made.size == image_size(data) == ((16, 24) if orientation in (5, 6, 7, 8) else (24, 16))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(made), np.asarray(expected))


def test_the_size_of_an_image_is_told_without_decoding_it():
    """A row's plan needs the size alone; what follows the header shows when it is decoded."""
    data, _ = broken.broken_images()["png_cut_in_half"]
    assert image_size(data) == (32, 32)
    with pytest.raises(BadSample):
        decode_image(data)


def test_mutated_images_give_an_image_or_a_reason():
    wholes = [*broken.odd_images().values(), broken.encoded(0), broken.encoded(0, "JPEG")]
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(400):
        data = bytearray(wholes[rng.integers(len(wholes))])
        for _ in range(rng.integers(1, 6)):
            # Not where sizes stand: what an honest giant costs is no matter of this test.
            data[rng.integers(40, len(data))] = rng.integers(256)
        data = bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data)
        try:
            stated, made = image_size(data), decode_image(data)
            assert made.size == stated and made.mode == "RGB"
            outcomes.add("image")
        except BadSample as error:
            outcomes.add(error.reason)
    assert {"image", "broken_image"} <= outcomes
