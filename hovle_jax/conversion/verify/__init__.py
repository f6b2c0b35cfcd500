"""Compares a checkpoint with reference outputs in its folder: every known array of `expected.npz`.

The names are the field's own (`logits`, `loss`, `grad.<tensor>`, ...); gradients have the public names and layouts.
"""

from hovle_jax.conversion.verify.reference import TOLERANCE, Reference
from hovle_jax.conversion.verify.run import verify

__all__ = ["TOLERANCE", "Reference", "verify"]
