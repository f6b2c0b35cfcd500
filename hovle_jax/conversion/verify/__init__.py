"""A checkpoint against reference outputs that lie beside it: every array of `expected.npz` that is known.

The names are the field's own (`logits`, `loss`, `grad.<tensor>`, ...); gradients have the public names and layouts.
"""

from hovle_jax.conversion.verify.report import TOLERANCE, Report
from hovle_jax.conversion.verify.run import verify

__all__ = ["TOLERANCE", "Report", "verify"]
