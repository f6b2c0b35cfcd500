"""Matmuls of a decoder's layers in int8, by qwix: in the forward pass alone, gradients multiply in the compute type."""

import jax
import jax.numpy as jnp

from hovle_jax.model.execution import local_matmul


@jax.custom_vjp
def int8_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., D] @ kernel [D, F] -> [..., F] on one device, in the type of x.

    Both are rounded to int8 by their largest values, of each row of x and of each column of the kernel. To gradients
    the rounding is the identity (Bengio et al. 2013, the straight-through estimator).
    """
    import qwix

    rounded = lambda array, axis: qwix.quantize(array.astype(jnp.float32), jnp.int8, channelwise_axes=[axis])
    rows = rounded(x.reshape(-1, x.shape[-1]), 0)
    out = qwix.dot_general(rows, rounded(kernel, 1), (((1,), (0,)), ((), ())))
    return out.astype(x.dtype).reshape(*x.shape[:-1], kernel.shape[-1])


def _forward(x, kernel):
    return int8_matmul(x, kernel), (x, kernel)


def _backward(saved, gradient):
    return jax.vjp(local_matmul, *saved)[1](gradient)


int8_matmul.defvjp(_forward, _backward)
