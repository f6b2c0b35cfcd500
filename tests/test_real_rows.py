"""Rows as training has them, packed from files with several tiles each: on a mesh the numbers of one device."""

import jax
import numpy as np
import pytest

from hovle_jax.config import MeshConfig, OptimizerConfig
from hovle_jax.corpora import loading
from hovle_jax.data import pipeline
from hovle_jax.sharding.mesh import make_mesh
from hovle_jax.training.stages import STAGES
from tests import micro
from tests.source_files import quiet
from tests.trees import assert_close, host

pytestmark = pytest.mark.usefixtures("quick_compilation", "own_cache")

SIZES = MeshConfig(data=2, fsdp=2, sequence=2)
# With Adam's usual eps a first update is the sign of the gradient, rounding included; with 1 it is as smooth as it.
SMOOTH = OptimizerConfig(learning_rate=1.0, warmup_steps=0, eps=1.0, weight_decay=0.1)


def config_of(path, stage, variant):
    data = dict(source=path, batch_size=8, sequence_length=224, tiles=8, max_tiles=4, augment=False)
    return micro.run_config(stage, variant, data=data, optimizer=SMOOTH)


def batches_of(config, count):
    corpus = loading.load_corpus(config, "train", quiet)
    dataset = pipeline.build_dataset(config, STAGES[config.stage].batch, micro.tokenizer(), corpus)
    return [dataset[i] for i in range(count)]


def trained(config, batches, mesh=None):
    """-> (metrics of each step, trained parameters)."""
    state, _, step = micro.start(config, mesh)
    metrics = []
    for batch in batches:
        state, found = step(state, batch)
        metrics.append(jax.device_get(found))
    return metrics, host(jax.device_get(state.trained))


@pytest.mark.slow
@pytest.mark.parametrize("stage, variant", [("instruct", "post")])
def test_packed_and_tiled_rows_train_the_same_on_a_mesh(path_of, stage, variant):
    config = config_of(path_of("jsonl"), stage, variant)
    batches = batches_of(config, 2)
    samples, tiles = batches[0]["segment_ids"].max(1), (batches[0]["tiles"] > 0).any((2, 3, 4)).sum(1)
    assert samples.max() > 1 and samples.min() < samples.max() and tiles.max() > samples.max()
    (metrics, wanted), before = trained(config, batches), host(micro.params(config))
    assert max(np.abs(value - before[name]).max() for name, value in wanted.items()) > 1e-2
    found, got = trained(config, batches, make_mesh(SIZES))
    for step, expected in zip(found, metrics, strict=True):
        assert step.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(step[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert_close({"all": wanted}, {"all": got})
