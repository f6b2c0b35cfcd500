"""The contrastive losses as they are written in the papers, with all scores at once: the twins of those of the ring."""

import jax
import jax.numpy as jnp


def scores(images, texts, log_scale, bias=0.0):
    product = jnp.einsum("ie,je->ij", images, texts, precision="highest", preferred_element_type=jnp.float32)
    return jnp.exp(log_scale) * product + bias


def softmax(images, texts, log_scale, bias=0.0):
    """CLIP's (Radford et al. 2021, figure 3), the mean over pairs."""
    z = scores(images, texts, log_scale, bias)
    losses = jax.nn.logsumexp(z, axis=1) + jax.nn.logsumexp(z, axis=0) - 2 * jnp.diagonal(z)
    return jnp.mean(losses) / 2


def sigmoid(images, texts, log_scale, bias=0.0):
    """SigLIP's (Zhai et al. 2023, algorithm 1), the mean over pairs."""
    z = scores(images, texts, log_scale, bias)
    return -jnp.sum(jax.nn.log_sigmoid((2 * jnp.eye(len(z)) - 1) * z)) / len(z)


PLAIN = {"softmax": softmax, "sigmoid": sigmoid}
