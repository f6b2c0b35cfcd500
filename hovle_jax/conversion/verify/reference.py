"""Reference outputs, and how far ours are from them."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from hovle_jax.errors import UserError

TOLERANCE = 2e-5
GRADIENT = "grad."
GRADIENT_ALIASES = {  # older names of two gradients
    "grad_tok_embeddings": "model.tok_embeddings.weight",
    "grad_wqkv0": "model.layers.0.attention.wqkv.weight",
}


class Reference:
    """The arrays of an expected.npz, and the result of comparing ours with them.

    Attributes:
      arrays: {name: array}: inputs and outputs of the reference.
      errors: {array: largest absolute error}, of those compared so far; NaN stays NaN.
      tokens: {array: whether all tokens are equal}, of those compared so far.
      unknown: names of arrays that nothing has read yet.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = dict(arrays)
        self.errors: dict[str, float] = {}
        self.tokens: dict[str, bool] = {}
        self.unknown = set(self.arrays)
        for name, array in self.arrays.items():
            if array.dtype.kind not in "biuf":
                raise UserError(f"expected.npz: {name} holds {array.dtype}, not numbers")

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def has(self, *names: str) -> bool:
        """Whether all of these arrays are there."""
        return all(name in self.arrays for name in names)

    # Inputs, each checked before it is used.

    def input(self, name: str, shape: tuple[int | None, ...] | None = None, kind: type | None = None) -> np.ndarray:
        """An input of the reference. Raises UserError where it is missing, or of another shape or kind.

        Args:
          shape: the required shape; None in it = any length along that axis.
          kind: the required NumPy type class, such as np.integer.
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

    def ids(self, name: str, vocab_size: int, shape: tuple[int | None, ...] = (None, None)) -> np.ndarray:
        """An input of token ids [B, L], int32. Raises UserError for another shape, or an id outside the vocabulary."""
        ids = self.input(name, shape, np.integer)
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise UserError(f"expected.npz: {name} has id {ids.max()}; the checkpoint has {vocab_size} tokens")
        return ids.astype(np.int32)

    def mask(self, name: str, tokens: np.ndarray) -> np.ndarray:
        """An input of zeros and ones, int32, of the shape of `tokens`. Raises UserError where a row has no one."""
        mask = self.input(name, tokens.shape)
        if not mask.astype(bool).any(1).all():
            raise UserError(f"expected.npz: {name} leaves nothing of row {int(np.argmin(mask.any(1)))} to compare")
        return mask.astype(bool).astype(np.int32)

    def number(self, name: str) -> int:
        """An input that is one integer."""
        array = self.input(name, kind=np.integer)
        if array.size != 1:
            raise UserError(f"expected.npz: {name} of shape {list(array.shape)} must be one number")
        return int(array.reshape(()))

    def tiles(self, patch_size: int) -> np.ndarray:
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

    def compare(self, name: str, ours: ArrayLike, where: ArrayLike = True) -> None:
        """Records the largest difference, if the reference has this array; `where` masks out what is not defined.

        Raises:
          UserError: the shapes differ, or nothing is left to compare.
        """
        if name not in self.arrays:
            return
        self.unknown.discard(name)
        expected, found = self.arrays[name], np.asarray(ours)
        if found.shape != expected.shape:
            raise UserError(f"{name} has shape {list(expected.shape)} in expected.npz; ours is {list(found.shape)}")
        difference = np.abs(found.astype(np.float64) - expected)
        if where is not True:
            difference = difference[np.asarray(where, bool)]
        if not difference.size:
            raise UserError(f"expected.npz: nothing of {name} (shape {list(expected.shape)}) is left to compare")
        self.errors[name] = float(np.max(difference))

    def compare_gradients(self, gradients: Mapping[str, ArrayLike]) -> None:
        """Compares public gradients {name: array} with every `grad.<name>`."""
        for name in self.arrays:
            public = GRADIENT_ALIASES.get(name, name.removeprefix(GRADIENT) if name.startswith(GRADIENT) else None)
            if public is not None and public in gradients:
                self.compare(name, gradients[public])

    def compare_tokens(self, name: str, ours: ArrayLike) -> None:
        """Records whether all tokens are equal."""
        self.unknown.discard(name)
        self.tokens[name] = np.array_equal(self.arrays[name], ours)

    def check_gradients(self) -> None:
        """Raises UserError where nothing was compared with one of the reference's gradients."""
        left = sorted(name for name in self.unknown if name.startswith(GRADIENT) or name in GRADIENT_ALIASES)
        if left and "labels" not in self.arrays and "pixel_values" not in self.arrays:
            raise UserError(f"expected.npz has {left[0]} and no labels, without which there are no gradients")
        if left:
            raise UserError(f"expected.npz: {', '.join(left)}: the checkpoint has no such tensor")

    def failed(self, tolerance: float = TOLERANCE) -> list[str]:
        """The names of the arrays that differ; NaN counts as different."""
        wrong = [name for name, error in self.errors.items() if not error <= tolerance]
        return wrong + [name for name, equal in self.tokens.items() if not equal]

    def passed(self, tolerance: float = TOLERANCE) -> bool:
        """Whether something was compared and nothing differs."""
        return bool(self.errors or self.tokens) and not self.failed(tolerance)
