"""Sizes of CLIP: its text tower, its ResNet, and both towers together."""

import dataclasses

from hovle_jax.errors import UserError
from hovle_jax.model.config import CLIP_MEAN, CLIP_STD, VISION_POOLINGS, ViTConfig

TEXT_POOLINGS = ("end", "highest", "last", "first")
PROJECTIONS = ("linear", "bias", "none")  # 'bias': with a bias
RESIZE_MODES, INTERPOLATIONS = ("squash", "shortest", "longest"), ("bicubic", "bilinear")


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """CLIP's modified ResNet (Radford et al. 2021, section 2.4); see model/resnet.py.

    Attributes:
      image_size: pixels along one side of the image; 32 of them make a place of the last feature map.
      width: channels after the stem; the four stages put out 4, 8, 16 and 32 times as many.
      layers: blocks of each stage.
      num_heads: of the attention that pools the last feature map.
      norm_eps: added to the variance in batch norm.
      image_mean, image_std: the tower's own normalisation of [0, 1] pixels.
    """

    image_size: int
    width: int
    layers: tuple[int, ...]
    num_heads: int
    norm_eps: float = 1e-5
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD

    @property
    def patch_size(self) -> int:
        """Pixels along one side of a place of the last feature map."""
        return 32

    @property
    def grid(self) -> int:
        """Places along one side of the last feature map."""
        return self.image_size // self.patch_size

    @property
    def num_layers(self) -> int:
        """Blocks of all stages."""
        return sum(self.layers)

    @property
    def channels(self) -> int:
        """Of the last feature map."""
        return 32 * self.width


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
    """The text tower of CLIP or SigLIP.

    Attributes:
      vocab_size: ids that it reads.
      width, num_layers, num_heads: of the transformer.
      mlp_width: inside the MLP.
      context: tokens of a caption, at most.
      end_id: the id of the end token.
      norm_eps: added to the variance in LayerNorm.
      activation: of the MLP: 'gelu', 'gelu_tanh' or 'quick_gelu'.
      causal: whether a token sees those before it alone (CLIP); SigLIP's see each other, padding included.
      pooling: of TEXT_POOLINGS: where a text is read: at the first end token, at its highest id, at the last or the
        first position.
      layer_scale: learned scales of the residual branches.
      pad_id: what follows a text; -1 = the end token.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    context: int
    end_id: int
    norm_eps: float = 1e-5
    activation: str = "gelu"
    causal: bool = True
    pooling: str = "end"
    layer_scale: bool = False
    pad_id: int = -1

    @property
    def padding_id(self) -> int:
        """The id that fills the context after a text."""
        return self.end_id if self.pad_id < 0 else self.pad_id


CONTRASTIVE_LOSSES = ("softmax", "sigmoid")
CLIP_PARTS = ("vision", "text", "vision_projection", "text_projection", "log_scale", "logit_bias")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Two towers whose projections are compared by their cosine.

    Attributes:
      projection_width: of the space that both towers project into.
      loss: what it is trained with, of CONTRASTIVE_LOSSES: CLIP's 'softmax', or SigLIP's 'sigmoid' with a learned bias.
      logit_scale_init: softmax: the logarithm of the scale (1 / temperature) at the start: ln(1 / 0.07).
      sigmoid_scale_init, logit_bias_init: sigmoid: the logarithm of the scale, and the bias, at the start.
      patch_dropout: training: the share of an image's patches that its tower does not see, 0 to below 1 (FLIP).
      batch_statistics: training: a ResNet normalises by the statistics of each batch, and those of the result are
        gathered at the end; without it, by the stored ones, as a public tower that is trained further should.
      frozen: training: what stays as it was loaded, of CLIP_PARTS, with commas; 'vision' is LiT's locked tower.
      vision_projection, text_projection: of PROJECTIONS; a tower without one has the width of the space itself.
      family: whose names and layout its public checkpoint has: 'clip' and 'siglip' are Hugging Face's, 'open_clip' and
        'open_clip_custom' (whose text tower has a prefix) open_clip's.
      resize, interpolation: how an image becomes the square that its tower sees, of RESIZE_MODES and INTERPOLATIONS.
      scalar_scale: whether the public checkpoint has scale and bias of shape [], or else [1].
    """

    vision: ViTConfig | ResNetConfig
    text: TextTowerConfig
    projection_width: int
    loss: str = "softmax"
    logit_scale_init: float = 2.6592600
    sigmoid_scale_init: float = 2.302585  # ln 10
    logit_bias_init: float = -10.0
    patch_dropout: float = 0.0
    batch_statistics: bool = False
    frozen: str = ""
    vision_projection: str = "linear"
    text_projection: str = "linear"
    resize: str = "squash"
    interpolation: str = "bicubic"
    family: str = "clip"
    scalar_scale: bool = True

    @property
    def kept_patches(self) -> int:
        """Patches of an image that training's image tower sees."""
        return max(1, round(self.vision.grid**2 * (1 - self.patch_dropout)))

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        return tuple(self.frozen.split(",")) if self.frozen else ()

    @property
    def has_bias(self) -> bool:
        """Whether the scores have a bias: in a softmax it would cancel."""
        return self.loss == "sigmoid"

    def check(self) -> None:
        """Raises UserError where the towers cannot be built, or do not meet in one space."""
        if self.loss not in CONTRASTIVE_LOSSES:
            raise UserError(f"clip.loss={self.loss!r}: use one of {', '.join(CONTRASTIVE_LOSSES)}")
        if not 0 <= self.patch_dropout < 1:
            raise UserError(f"clip.patch_dropout={self.patch_dropout} is a share of patches: from 0 to below 1")
        if unknown := [part for part in self.frozen_parts if part not in CLIP_PARTS]:
            raise UserError(f"clip.frozen names {', '.join(unknown)}: use some of {','.join(CLIP_PARTS)}")
        if {"vision", "text"} <= set(self.frozen_parts):
            raise UserError(f"clip.frozen={self.frozen!r} leaves no tower to be trained")
        if self.patch_dropout and isinstance(self.vision, ResNetConfig):
            raise UserError("clip.patch_dropout: a ResNet has no patches to leave out; set it to 0")
        if self.batch_statistics and not isinstance(self.vision, ResNetConfig):
            raise UserError("clip.batch_statistics: a ViT has no batch norm; set it to False")
        if self.batch_statistics and "vision" in self.frozen_parts:
            raise UserError("clip.batch_statistics: a frozen image tower keeps its own; set it to False")
        v, t = self.vision, self.text
        choices = {
            "text.pooling": (t.pooling, TEXT_POOLINGS),
            "vision_projection": (self.vision_projection, PROJECTIONS),
        }
        choices |= {"text_projection": (self.text_projection, PROJECTIONS)}
        choices |= {"resize": (self.resize, RESIZE_MODES), "interpolation": (self.interpolation, INTERPOLATIONS)}
        if isinstance(v, ViTConfig):
            choices |= {"vision.pooling": (v.pooling, VISION_POOLINGS)}
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise UserError(f"clip.{name}={value!r} is not one of {', '.join(allowed)}")
        heads = {"text": (t.width, t.num_heads)}
        heads["vision"] = (v.width if isinstance(v, ViTConfig) else v.channels, v.num_heads)
        for name, (width, count) in heads.items():
            if width % count:
                raise UserError(f"clip.{name}: {count} heads do not divide the width {width}")
        if isinstance(v, ResNetConfig) and v.image_size % v.patch_size or v.image_size < v.patch_size:
            kind = "a multiple of" if isinstance(v, ResNetConfig) else "at least"
            raise UserError(f"clip.vision: image_size={v.image_size} must be {kind} {v.patch_size} pixels")
        if isinstance(v, ViTConfig) and v.pooling == "class" and not v.class_token:
            raise UserError("clip.vision.pooling='class' needs class_token=True; else use 'mean' or 'map'")
        if isinstance(v, ViTConfig) and not v.post_norm:
            raise UserError("clip.vision.post_norm=False: a tower of CLIP has a norm after its layers; set it")
        if isinstance(v, ResNetConfig) and self.vision_projection != "linear":
            raise UserError("clip.vision_projection: a ResNet projects where it pools; set it to 'linear'")
        for name, width, projection in (
            ("vision", v.width, self.vision_projection),
            ("text", t.width, self.text_projection),
        ):
            if projection == "none" and width != self.projection_width:
                raise UserError(
                    f"clip.{name}.width={width} must be projection_width={self.projection_width}, as the tower has no "
                    "projection"
                )
