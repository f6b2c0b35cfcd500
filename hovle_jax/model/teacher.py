"""The image target of distillation: any tower, 2x2 pixel shuffle, and optionally InternVL2's projector.

Dimension letters: M tiles, P patches, D tower width.
"""

import flax.linen as nn
import jax

from hovle_jax.model.clip_config import ResNetConfig
from hovle_jax.model.dense import dense
from hovle_jax.model.execution import Execution
from hovle_jax.model.resnet import ModifiedResNet
from hovle_jax.model.teacher_config import TeacherConfig
from hovle_jax.model.vision import normalize_tiles, pixel_shuffle, resize_features
from hovle_jax.model.vit import LayerNorm, VisionTransformer


class MLP1(nn.Module):
    """InternVL2's projector: LayerNorm(4D), Linear(4D, width), exact GELU, Linear(width, width)."""

    width: int
    execution: Execution

    @nn.compact
    def __call__(self, x):
        y = LayerNorm(1e-5, name="norm")(x)
        y = dense(self.width, ("patch", "embed"), "in", self.execution, use_bias=True)(y)
        return dense(self.width, ("embed", "embed_out"), "out", self.execution, use_bias=True)(
            nn.gelu(y, approximate=False)
        )


class StudentHead(nn.Module):
    """Brings the student's width to that of a 'linear' teacher; dropped after distillation."""

    width: int
    execution: Execution

    @nn.compact
    def __call__(self, x):
        return dense(self.width, ("embed", "embed_out"), "projection", self.execution)(x)


class VisionTeacher(nn.Module):
    """A frozen tower as a teacher."""

    config: TeacherConfig
    execution: Execution

    @nn.compact
    def __call__(self, tiles, tokens_per_tile):
        """[M, S, S, 3] uint8 (or normalised floats) -> features [M, tokens_per_tile, width of the target].

        Tiles of another size than the tower's are resized to it, and its grid to the student's, both bilinearly.
        """
        c = self.config.vision
        if tiles.shape[1] != c.image_size:
            tiles = normalize_tiles(tiles, c.image_mean, c.image_std)
            tiles = jax.image.resize(tiles, (tiles.shape[0], c.image_size, c.image_size, 3), "bilinear")
        side = 2 * int(tokens_per_tile**0.5)
        x = pixel_shuffle(resize_features(self.patches(tiles), side))
        if self.config.projector != "mlp1":
            return x
        return MLP1(self.config.projector_width, self.execution, name="mlp1")(x)

    def patches(self, tiles: jax.Array) -> jax.Array:
        """The tower's patches after the teacher's layers, [M, P, D]."""
        c, layers = self.config.vision, self.config.num_layers
        if isinstance(c, ResNetConfig):
            return ModifiedResNet(c, 0, self.execution, layers, name="vision")(tiles)[0]
        hidden, _ = VisionTransformer(c, self.execution, layers, with_post_norm=False, name="vision")(tiles)
        return hidden[:, 1:] if c.class_token else hidden
