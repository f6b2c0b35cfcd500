"""The last layer of a tower of which one token is read: it gives what the whole tower gives, in less time."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hovle_jax.model.clip import CLIP
from hovle_jax.model.execution import Execution
from tests import micro

WAYS = {
    "a loop": {}, "unrolled": {"unroll_layers": True}, "rematerialised": {"remat": "full"},
    "one layer": {"layers": 1}, "read at the highest id": {"pooling": "highest"},
    "read at the first place, with masks": {"pooling": "first", "causal": False},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_one_tokens_output_is_that_of_the_whole_tower(way):
    """And so are its gradients: to the last layer, to those before it, to what it reads."""
    options = dict(WAYS[way])
    layers = options.pop("layers", 3)
    execution = Execution(unroll_layers=options.pop("unroll_layers", False), remat=options.pop("remat", "none"))
    text = dataclasses.replace(micro.clip_config().text, num_layers=layers, **options)
    vision = dataclasses.replace(micro.clip_config().vision, num_layers=layers)
    model = CLIP(dataclasses.replace(micro.clip_config(), vision=vision, text=text), execution)
    rng = np.random.default_rng(0)
    tiles = jnp.asarray(rng.normal(size=(4, vision.image_size, vision.image_size, 3)), jnp.float32)
    tokens = jnp.asarray(rng.integers(3, 90, (4, 9))).at[jnp.arange(4), jnp.asarray([2, 8, 5, 3])].set(text.end_id)
    mask = None if text.causal else jnp.asarray(rng.integers(0, 2, (4, 9))).at[:, 0].set(1)
    params = nn.meta.unbox(model.init(jax.random.key(0), tiles, tokens))["params"]
    params = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.normal(size=leaf.shape) * 0.1, leaf.dtype), params)

    def vectors(params, whole):
        def both(model):
            images = model.image_states(tiles, whole=whole)[2]
            return images, model.text_states(tokens, mask, whole)[2]

        return model.apply({"params": params}, method=both)

    for made, expected in zip(vectors(params, False), vectors(params, True)):
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5)
    loss = lambda params, whole: sum(jnp.sum(jnp.sin(3 * each)) for each in vectors(params, whole))
    made, expected = (jax.jit(jax.grad(loss), static_argnums=1)(params, whole) for whole in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), made, expected)
