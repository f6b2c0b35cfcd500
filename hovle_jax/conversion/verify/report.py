"""What a reference has, what was compared with it, and how far off it was."""

import numpy as np

from hovle_jax.errors import UserError

TOLERANCE = 2e-5
GRADIENT = "grad."
GRADIENT_ALIASES = {  # older names of two gradients
    "grad_tok_embeddings": "model.tok_embeddings.weight",
    "grad_wqkv0": "model.layers.0.attention.wqkv.weight",
}


class Report:
    """What was compared.

    Attributes:
      arrays: {name: array} of the reference.
      errors: {array: largest absolute error}; not a number stays so.
      tokens: {array: whether all tokens are equal}.
      unknown: arrays that nothing is known about, so far.
    """

    def __init__(self, arrays):
        self.arrays = dict(arrays)
        self.errors, self.tokens = {}, {}
        self.unknown = set(self.arrays)
        for name, array in self.arrays.items():
            if array.dtype.kind not in "biuf":
                raise UserError(f"expected.npz: {name} holds {array.dtype}, not numbers")

    def __contains__(self, name):
        return name in self.arrays

    def has(self, *names):
        """Whether all of these are there; what needs an input that is not stays unknown."""
        return all(name in self.arrays for name in names)

    # Inputs, each checked before it is used.

    def input(self, name, shape=None, kind=None):
        """An array that the reference was given. Raises UserError where it is missing, or of another shape or kind.

        Args:
          shape: the shape that it must have; None = any length along that axis.
          kind: NumPy's type class that it must be of, as np.integer.
        """
        if name not in self.arrays:
            raise UserError(f"expected.npz lacks {name!r}, without which nothing can be compared")
        self.unknown.discard(name)
        array = self.arrays[name]
        if kind is not None and not np.issubdtype(array.dtype, kind):
            raise UserError(f"expected.npz: {name} holds {array.dtype}; {kind.__name__} numbers are needed")
        if shape is not None and (
            len(shape) != array.ndim or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True))
        ):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise UserError(f"expected.npz: {name} of shape {list(array.shape)} must be [{wanted}]")
        return array

    def ids(self, name, vocab_size, shape=(None, None)):
        """An input of token ids [B, L], int32. Raises UserError for another shape, or an id that is none."""
        ids = self.input(name, shape, np.integer)
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise UserError(f"expected.npz: {name} has id {ids.max()}; the checkpoint has {vocab_size} tokens")
        return ids.astype(np.int32)

    def mask(self, name, tokens):
        """An input of zeros and ones, of the shape of `tokens`, with something in every row."""
        mask = self.input(name, tokens.shape)
        if not mask.astype(bool).any(1).all():
            raise UserError(f"expected.npz: {name} leaves nothing of row {int(np.argmin(mask.any(1)))} to compare")
        return mask.astype(bool).astype(np.int32)

    def number(self, name):
        """An input that is one integer."""
        array = self.input(name, kind=np.integer)
        if array.size != 1:
            raise UserError(f"expected.npz: {name} of shape {list(array.shape)} must be one number")
        return int(array.reshape(()))

    def tiles(self, patch_size):
        """The input pixel_values [M, 3, S, S], normalised, as [M, S, S, 3]."""
        pixels = self.input("pixel_values")
        size = pixels.shape[-1] if pixels.ndim else 0
        if pixels.shape != (len(pixels) if pixels.ndim else 0, 3, size, size) or not size or size % patch_size:
            raise UserError(
                f"expected.npz: pixel_values of shape {list(pixels.shape)} must be [tiles, 3, size, size], with a size "
                f"that {patch_size} (patch_size) divides"
            )
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))

    # Outputs.

    def compare(self, name, ours, where=True):
        """Notes the largest difference, if the reference has this array; `where` leaves out what is not defined.

        Raises:
          UserError: shapes differ, or nothing is left to compare.
        """
        if name not in self.arrays:
            return
        self.unknown.discard(name)
        reference, ours = self.arrays[name], np.asarray(ours)
        if ours.shape != reference.shape:
            raise UserError(f"{name} has shape {list(reference.shape)} in expected.npz; ours is {list(ours.shape)}")
        difference = np.abs(ours.astype(np.float64) - reference)
        if where is not True:
            difference = difference[np.asarray(where, bool)]
        if not difference.size:
            raise UserError(f"expected.npz: nothing of {name} (shape {list(reference.shape)}) is left to compare")
        self.errors[name] = float(np.max(difference))

    def compare_gradients(self, gradients):
        """Public gradients {name: array} with every `grad.<name>`."""
        for name in self.arrays:
            public = GRADIENT_ALIASES.get(name, name.removeprefix(GRADIENT) if name.startswith(GRADIENT) else None)
            if public in gradients:
                self.compare(name, gradients[public])

    def compare_tokens(self, name, ours):
        """Notes whether all tokens are equal."""
        self.unknown.discard(name)
        self.tokens[name] = np.array_equal(self.arrays[name], ours)

    def check_gradients(self):
        """Raises UserError where a gradient of the reference was compared with nothing."""
        left = sorted(name for name in self.unknown if name.startswith(GRADIENT) or name in GRADIENT_ALIASES)
        if left and "labels" not in self.arrays:
            raise UserError(f"expected.npz has {left[0]} and no labels, without which there are no gradients")
        if left:
            raise UserError(f"expected.npz: {', '.join(left)}: the checkpoint has no such tensor")

    def failed(self, tolerance=TOLERANCE):
        """Names of arrays that differ; NaN differs."""
        wrong = [name for name, error in self.errors.items() if not error <= tolerance]
        return wrong + [name for name, equal in self.tokens.items() if not equal]

    def passed(self, tolerance=TOLERANCE):
        """Whether something was compared, and nothing differs."""
        return bool(self.errors or self.tokens) and not self.failed(tolerance)
