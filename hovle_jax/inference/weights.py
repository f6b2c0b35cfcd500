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

from hovle_jax.inference.products import product

INT8 = 127.0
SHARE = 1 / 32  # of the columns that have a second half
LEADERS = 32  # logits that are made anew


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
    """A kernel in int8, and what the first rounding left of some of its columns.

    A column is what one input is multiplied by. Inputs become int8 too, so that the product is one of integers, but
    twice: coarse, and what that left, 254 times as finely. Both halves are rows of one product, which reads the kernel
    once. The second halves of columns meet the coarse inputs in the fine row, where all counts a 254th.

    Attributes:
      kernel: [F, D + n] int8: the columns, then the second halves of n of them.
      columns: [n] int32: which ones.
      scale: [F] float32.
      bias: [F] or None.
    """

    kernel: jax.Array
    columns: jax.Array
    scale: jax.Array
    bias: jax.Array | None = None

    @classmethod
    def of(cls, kernel: jax.Array, bias: jax.Array | None, inputs: jax.Array) -> "Int8Kernel":
        """Rounds a kernel [F, D]; the largest number of an output becomes 127 or -127.

        Args:
          inputs: [D]: how large they are expected to be. The columns of the largest `SHARE` get a second half.
        """
        coarse, rest, scale = _rounded(kernel)
        columns = jnp.argsort(-inputs)[: int(kernel.shape[1] * SHARE)].astype(jnp.int32)
        return cls(jnp.concatenate([coarse, _second_half(rest[:, columns])], axis=1), columns, scale, bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., F] in the type of x."""
        # Else each of the three that read it makes it anew, with the activation or the norm that it comes from.
        rows = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).astype(jnp.float32))
        step = jnp.maximum(jnp.max(jnp.abs(rows), axis=1, keepdims=True), 1e-30) / INT8
        coarse = jnp.round(rows / step)
        fine = jnp.round((rows / step - coarse) * (2 * INT8))
        again = coarse[:, self.columns]
        parts = [(coarse, fine), (jnp.zeros_like(again), again)]
        # Else what is computed is computed anew for each place of the concatenation, one after another.
        both = jax.lax.optimization_barrier([jnp.concatenate(halves).astype(jnp.int8) for halves in parts])
        coarse, fine = jnp.split(_product(jnp.concatenate(both, axis=1), self.kernel, jnp.int32).astype(jnp.float32), 2)
        out = _biased((coarse + fine / (2 * INT8)) * step * self.scale, self.bias)
        return out.reshape(*x.shape[:-1], -1).astype(x.dtype)


@flax.struct.dataclass
class Int8Head:
    """A head in int8 whose largest logits are made anew with the second halves of their columns, which others need not.

    Attributes:
      coarse: without second halves.
      fine: [F, D] int8: all of them, 254 times as finely.
    """

    coarse: Int8Kernel
    fine: jax.Array

    @classmethod
    def of(cls, kernel: jax.Array) -> "Int8Head":
        """Rounds a kernel [F, D]."""
        coarse, rest, scale = _rounded(kernel)
        return cls(Int8Kernel(coarse, jnp.zeros(0, jnp.int32), scale), _second_half(rest))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, D] -> [B, F] float32."""
        x = x.astype(jnp.float32)
        logits = self.coarse(x)
        leaders = jax.lax.top_k(logits, min(LEADERS, len(self.fine)))[1]
        rows = self.fine[leaders].astype(jnp.float32)
        rest = jnp.einsum("bkd,bd->bk", rows, x) * self.coarse.scale[leaders] / (2 * INT8)
        return logits.at[jnp.arange(len(x))[:, None], leaders].add(rest)


def _rounded(kernel):
    """A kernel [F, D] -> (in int8, what that left in float32, [F]: what both are multiples of)."""
    kernel = kernel.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=1), 1e-30) / INT8
    scaled = kernel / scale[:, None]
    coarse = jnp.round(scaled)
    return coarse.astype(jnp.int8), scaled - coarse, scale


def _second_half(rest):
    return jnp.round(rest * (2 * INT8)).astype(jnp.int8)


def _product(x, kernel, result):
    """x [..., D], kernel [F, D] -> [..., F] in the type `result`."""
    return product(x.reshape(-1, x.shape[-1]), kernel, result).reshape(*x.shape[:-1], len(kernel))


def _biased(x, bias):
    return x if bias is None else x + bias.astype(x.dtype)


def joined(denses: Sequence[dict], dtype: Any, inputs: jax.Array | None = None) -> Kernel | Int8Kernel:
    """One kernel of the Linen Denses {'kernel' [D, F], 'bias' [F]} of the same input, their outputs side by side.

    Either all have a bias or none.

    Args:
      inputs: see `Int8Kernel.of`, which is made where they are given.
    """
    kernel = jnp.concatenate([dense["kernel"].T for dense in denses])
    bias = jnp.concatenate([dense["bias"] for dense in denses]) if "bias" in denses[0] else None
    return Kernel(kernel.astype(dtype), bias) if inputs is None else Int8Kernel.of(kernel, bias, inputs)


def head_of(table: jax.Array, dtype: Any, int8: bool) -> Kernel | Int8Head:
    """A head [F, D] in the type that decoding reads."""
    return Int8Head.of(table) if int8 else Kernel(table.astype(dtype))


def is_int8(params: dict) -> bool:
    """Whether the weights of an engine are in int8."""
    return isinstance(params["head"], Int8Head)
