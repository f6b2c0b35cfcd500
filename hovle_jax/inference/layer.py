"""The decoder layer of model/transformer.py over fused weights: the same numbers from fewer and larger products.

Dimension letters: B rows, T tokens, D width, H heads, K kv heads, C head dim, F ffn width.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from hovle_jax.inference.weights import Int8Kernel, Kernel, joined
from hovle_jax.model.config import StackConfig
from hovle_jax.model.execution import Execution
from hovle_jax.model.rotary import rotate
from hovle_jax.model.transformer import RMSNorm

NORMS = ("attention_norm", "ffn_norm", "query_norm", "key_norm")
PRODUCTS = {"qkv": ("query", "key", "value"), "output": ("output",), "gate_up": ("gate", "up"), "down": ("down",)}


@flax.struct.dataclass
class LayerWeights:
    """What one layer reads.

    Attributes:
      attention_norm, ffn_norm: [D].
      query_norm, key_norm: [C], or None.
      qkv: D -> (H + 2 K) C; output: H C -> D; gate_up: D -> 2 F; down: F -> D.
    """

    attention_norm: jax.Array
    ffn_norm: jax.Array
    query_norm: jax.Array | None
    key_norm: jax.Array | None
    qkv: Kernel | Int8Kernel
    output: Kernel | Int8Kernel
    gate_up: Kernel | Int8Kernel
    down: Kernel | Int8Kernel

    @classmethod
    def of_stack(
        cls, params: dict, count: int, dtype: Any, inputs: dict | None = None, consume: bool = False
    ) -> list["LayerWeights"]:
        """From the parameters of `count` layers `transformer.DecoderLayer`, stacked [N, ...].

        Args:
          inputs: for weights in int8: {name of `PRODUCTS`: [N, D], see `Int8Kernel.of`}.
          consume: delete the kernels given, one after another, as soon as they have been read, so that they and what
            is made of them never lie beside each other.
        """

        def kernels(product):
            names = PRODUCTS[product]
            sizes = [inputs[product][i] if inputs else None for i in range(count)]
            found = [joined([_layer(params[name], i) for name in names], dtype, sizes[i]) for i in range(count)]
            if consume:
                jax.block_until_ready(found)
                jax.tree.map(lambda leaf: leaf.delete(), [params[name] for name in names])
            return found

        def norms(name):
            return [params[name]["scale"][i].astype(dtype) if name in params else None for i in range(count)]

        columns = {name: norms(name) for name in NORMS} | {product: kernels(product) for product in PRODUCTS}
        return [cls(**dict(zip(columns, row))) for row in zip(*columns.values())]


def _layer(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def normalized(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """`transformer.RMSNorm` of x [..., D]."""
    return RMSNorm(epsilon).bind({"params": {"scale": scale}})(x)


def run_layer(
    config: StackConfig,
    execution: Execution,
    weights: LayerWeights,
    x: jax.Array,
    cache: Any,
    angles: Any,
    where: Any,
    only: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """x [B, T, D] -> (x, cache); arguments as those of `transformer.DecoderLayer`.

    Args:
      only: int32 scalar: the one token whose output is wanted, [B, 1, D], while all are kept in the cache.
    """
    B, T, _ = x.shape
    H, K, C = config.num_heads, config.num_kv_heads, config.head_dim
    qkv = weights.qkv(normalized(x, weights.attention_norm, config.norm_eps)).reshape(B, T, H + 2 * K, C)
    query, key, value = jnp.split(qkv, (H, H + K), axis=2)
    if weights.query_norm is not None and weights.key_norm is not None:
        query = normalized(query, weights.query_norm, config.norm_eps)
        key = normalized(key, weights.key_norm, config.norm_eps)
    out, cache = cache.attend(rotate(query, *angles), rotate(key, *angles), value, where, execution)
    out = out.reshape(B, T, H * C)
    if only is not None:
        x, out = (jax.lax.dynamic_slice_in_dim(tokens, only, 1, axis=1) for tokens in (x, out))
    x = x + weights.output(out)
    gate, up = jnp.split(weights.gate_up(normalized(x, weights.ffn_norm, config.norm_eps)), 2, axis=-1)
    # In float32: rounded once, and on a CPU in less than half of the time that bfloat16 takes.
    gated = jax.nn.silu(gate.astype(jnp.float32)) * up
    return x + weights.down(gated.astype(x.dtype)), cache
