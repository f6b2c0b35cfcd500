"""How a CLIP's image tower is given an image: one square tile, resized as its public preprocessor does it."""

import dataclasses
import typing

import numpy as np

from hovle_jax.data.images import as_image
from hovle_jax.model.clip_config import CLIPConfig

if typing.TYPE_CHECKING:  # Pillow is imported where it is used
    from PIL import Image


@dataclasses.dataclass(frozen=True)
class Resizing:
    """From an image of any size to a square one.

    Attributes:
      size: S, pixels along one side of the square.
      mode: of `clip_config.RESIZE_MODES`: both sides to S ('squash'); the shorter one, and the middle is cut out
        ('shortest'); or the longer one, and black fills the rest ('longest').
      interpolation: of `clip_config.INTERPOLATIONS`, with antialiasing, as Pillow does it.
    """

    size: int
    mode: str = "squash"
    interpolation: str = "bicubic"

    @classmethod
    def of(cls, config: CLIPConfig) -> "Resizing":
        """The resizing of a model."""
        return cls(config.vision.image_size, config.resize, config.interpolation)

    def tile(self, image: "Image.Image | np.ndarray") -> np.ndarray:
        """A Pillow RGB image, or [H, W, 3] uint8 -> [S, S, 3] uint8."""
        from PIL import Image

        image = as_image(image)
        if image.mode != "RGB":
            image = image.convert("RGB")
        width, height = self._whole(*image.size)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        left, top = (round((side - self.size) / 2) for side in (width, height))  # torchvision's rounding
        if (width, height) != (self.size, self.size):
            image = image.crop((left, top, left + self.size, top + self.size))  # what is outside is black
        return np.asarray(image, np.uint8)

    def _whole(self, width, height):
        """The size to which an image is resized before its middle is taken."""
        if self.mode == "squash":
            return self.size, self.size
        fixed = min(width, height) if self.mode == "shortest" else max(width, height)
        # The fixed side exactly, the other one as torchvision cuts it off.
        return tuple(self.size if side == fixed else max(1, int(self.size * side / fixed)) for side in (width, height))
