"""Weights as decoding reads them: fused, one output's numbers in a row, in bfloat16, float32 or int8.

Decoding is bound by the bytes that it reads, so that products of the same input are one kernel (query, key and value;
gate and up), and a kernel is [outputs, inputs]: a token reads it in the order in which it lies.

Dimension letters: D inputs, F outputs.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

INT8 = 127.0


@flax.struct.dataclass
class Kernel:
    """A kernel [F, D] in the compute type, and a bias [F] or None."""

    kernel: jax.Array
    bias: jax.Array | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., F] in the type of x."""
        return _biased(_product(x, self.kernel, jnp.float32), self.bias).astype(x.dtype)


@flax.struct.dataclass
class Int8Kernel:
    """A kernel in int8: kernel [F, D], the scale of each output [F] float32, and a bias [F] or None.

    Inputs become int8 too, so that the product is one of integers, but twice: what the first rounding left is rounded
    again, 254 times as finely. Both halves are rows of one product, which reads the kernel once.
    """

    kernel: jax.Array
    scale: jax.Array
    bias: jax.Array | None = None

    @classmethod
    def of(cls, kernel: jax.Array, bias: jax.Array | None) -> "Int8Kernel":
        """Rounds a kernel [F, D]; the largest number of an output becomes 127 or -127."""
        scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=1), 1e-30).astype(jnp.float32) / INT8
        return cls(jnp.round(kernel / scale[:, None]).astype(jnp.int8), scale, bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., F] in the type of x."""
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        step = jnp.maximum(jnp.max(jnp.abs(rows), axis=1, keepdims=True), 1e-30) / INT8
        coarse = jnp.round(rows / step)
        fine = jnp.round((rows / step - coarse) * (2 * INT8))
        both = jnp.concatenate([coarse, fine]).astype(jnp.int8)
        coarse, fine = jnp.split(_product(both, self.kernel, jnp.int32).astype(jnp.float32), 2)
        out = _biased((coarse + fine / (2 * INT8)) * step * self.scale, self.bias)
        return out.reshape(*x.shape[:-1], -1).astype(x.dtype)


def _product(x, kernel, result):
    """x [..., D], kernel [F, D] -> [..., F] in the type `result`."""
    rows = x.reshape(-1, x.shape[-1])
    # XLA's CPU backend is ten times slower with one vector of bfloat16 than with two.
    alone = len(rows) == 1 and rows.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
    rows = jnp.concatenate([rows, rows]) if alone else rows
    out = jax.lax.dot_general(rows, kernel, (((1,), (1,)), ((), ())), preferred_element_type=result)
    return (out[:1] if alone else out).reshape(*x.shape[:-1], len(kernel))


def _biased(x, bias):
    return x if bias is None else x + bias.astype(x.dtype)


def joined(denses: Sequence[dict], dtype: Any, int8: bool) -> Kernel | Int8Kernel:
    """One kernel of the Linen Denses {'kernel' [D, F], 'bias' [F]} of the same input, their outputs side by side.

    Either all have a bias or none.
    """
    kernel = jnp.concatenate([dense["kernel"].T for dense in denses])
    bias = jnp.concatenate([dense["bias"] for dense in denses]) if "bias" in denses[0] else None
    return kernel_of(kernel, bias, dtype, int8)


def kernel_of(kernel: jax.Array, bias: jax.Array | None, dtype: Any, int8: bool) -> Kernel | Int8Kernel:
    """A kernel [F, D] in the type that decoding reads."""
    return Int8Kernel.of(kernel, bias) if int8 else Kernel(kernel.astype(dtype), bias)
