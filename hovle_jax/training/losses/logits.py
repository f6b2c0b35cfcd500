"""A student that learns its teacher's distribution of the next token: values for each token, in float32.

Dimension letters: V vocabulary.
"""

import jax
import jax.numpy as jnp


def softened_kl(student: jax.Array, teacher: jax.Array, temperature: float = 1.0) -> jax.Array:
    """KL(teacher || student), both softened: logits [..., V] -> nats [...] (Hinton et al. 2015, section 2).

    Its gradient falls with the square of the temperature: beside another loss it is multiplied by that square.
    """
    student, teacher = (jax.nn.log_softmax(logits / temperature) for logits in (student, teacher))
    return _kl(teacher, student)


def generalized_jsd(student: jax.Array, teacher: jax.Array, beta: float = 0.5, temperature: float = 1.0) -> jax.Array:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student, [...].

    KL(teacher || student) at beta = 0, KL(student || teacher) at beta = 1 (Agarwal et al. 2024, equation 1).
    """
    student, teacher = (jax.nn.log_softmax(logits / temperature) for logits in (student, teacher))
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixed = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
    return beta * _kl(teacher, mixed) + (1 - beta) * _kl(student, mixed)


def _kl(p, q):
    """KL(p || q) of log-probabilities [..., V]."""
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
