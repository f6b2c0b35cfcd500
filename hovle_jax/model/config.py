"""Sizes and options of the models: frozen dataclasses."""

import dataclasses

from hovle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies for longer texts than `original_length`; see model/rotary.py.

    Attributes:
      factor: how many times longer the texts are.
      original_length: tokens of the texts that the frequencies were learned on.
      kind: 'linear', 'llama3', 'yarn', 'factors', or 'dynamic' (NTK: the base grows with a text beyond the length).
      low_frequency_factor, high_frequency_factor: llama3: how many turns over `original_length` bound the blend.
      beta_fast, beta_slow: yarn: the same bounds.
      attention_factor: yarn: scales cos and sin; 0 = from `factor`.
      truncate: yarn: whether the bounds are rounded to whole pairs.
      factors: what each pair's frequency is divided by.
    """

    kind: str
    factor: float
    original_length: int
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True
    factors: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """A stack of decoder layers: InternLM2's, and with the options those of Llama, Qwen2 and Qwen3.

    Attributes:
      num_layers: decoder layers.
      width: D, of the residual stream.
      num_heads, num_kv_heads: H query heads, and the K key and value heads that they share.
      head_dim: C, of each head; even.
      mlp_width: F, inside the gated MLP.
      rope_theta: base of the rotary frequencies.
      norm_eps: added to the mean square in RMSNorm.
      rope_scaling: None = rotary frequencies as they are.
      qkv_bias, output_bias, mlp_bias: biases of the projections (Qwen2: qkv_bias).
      qk_norm: RMSNorm of each query and key head before its rotation (Qwen3).
    """

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def check(self, name: str) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{name}: num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"{name}: head_dim={self.head_dim} must be even, rotary positions turn pairs")
        if self.rope_scaling is not None and self.rope_scaling.kind == "dynamic" and self.head_dim < 4:
            raise UserError(f"{name}: dynamic rotary positions need a head_dim of at least 4, not {self.head_dim}")


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """Token table, stack, final norm, head.

    Attributes:
      vocab_size: V, ids that it reads and writes.
      max_length: the longest sequence, in tokens.
      tied: the head is the token table (small Llama and Qwen models).
      head_stored: tied: a public checkpoint has the head all the same, as a copy.
      family: whose names and options a public checkpoint of it has: 'internlm2', 'llama', 'qwen2', 'qwen3'.
      vocab_multiple: the table and the head are padded to a multiple of it, so that a mesh axis divides them; an export
        crops them, and the logits of padding are never chosen.
    """

    stack: StackConfig
    vocab_size: int
    max_length: int = 32768
    tied: bool = False
    family: str = "internlm2"
    vocab_multiple: int = 1
    head_stored: bool = False

    @property
    def table_rows(self) -> int:
        return round_up(self.vocab_size, self.vocab_multiple)


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is no less than `size`."""
    return -(-size // multiple) * multiple


PIXEL_SHUFFLE = ("pre", "post", "none")


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
    """The holistic embedding.

    Attributes:
      image_size: the tile side for which positions were learned.
      force_image_size: the tile side that is read, where it is another one (the positions are resized); 0 = the same.
      patch_size: pixels along one side of a patch.
      pixel_shuffle: 'pre' (HoVLE: 2x2 patches become one token before the layers), 'post' (HD: after them) or
        'none' (a patch is a token).
      vocab_size: ids below it are rows of the text table.
      num_special_tokens: rows of the optional second table, for ids at and above `vocab_size`.
      normalize_output: L2-normalise the output before the LLM reads it.
      family: whose decoder layer it is, for the names of its tensors.
      vocab_multiple: as the LLM's, for the text table.
    """

    stack: StackConfig
    image_size: int
    patch_size: int
    vocab_size: int
    pixel_shuffle: str = "pre"
    num_special_tokens: int = 0
    normalize_output: bool = False
    family: str = "internlm2"
    vocab_multiple: int = 1
    force_image_size: int = 0

    @property
    def table_rows(self) -> int:
        """Of the text table."""
        return round_up(self.vocab_size, self.vocab_multiple)

    @property
    def num_tokens(self) -> int:
        """All ids that it knows."""
        return self.vocab_size + self.num_special_tokens

    @property
    def tile_size(self) -> int:
        """Pixels along one side of a tile."""
        return self.force_image_size or self.image_size

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.tile_size // self.patch_size

    @property
    def position_grid(self) -> int:
        """Learned positions along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile as the LLM sees them."""
        return self.grid**2 if self.pixel_shuffle == "none" else (self.grid // 2) ** 2

    @property
    def stack_tokens_per_tile(self) -> int:
        """Visual tokens of one tile inside the embedding's layers (HD: four times as many)."""
        return self.grid**2 if self.pixel_shuffle == "post" else self.tokens_per_tile

    def check(self) -> None:
        self.stack.check("model.embedding.stack")
        if self.pixel_shuffle not in PIXEL_SHUFFLE:
            raise UserError(f"model.embedding.pixel_shuffle={self.pixel_shuffle!r}: use one of {PIXEL_SHUFFLE}")
        for name in ("image_size", "force_image_size"):
            if getattr(self, name) % self.patch_size:
                raise UserError(
                    f"model.embedding: {name}={getattr(self, name)} must be a multiple of patch_size={self.patch_size}"
                )
        if self.pixel_shuffle != "none" and self.grid % 2:
            raise UserError(
                f"model.embedding: the {self.grid}x{self.grid} patch grid is odd and cannot be pixel-shuffled 2x2; "
                f"use tiles of {self.tile_size + self.patch_size} pixels or pixel_shuffle='none'"
            )


@dataclasses.dataclass(frozen=True)
class HoVLEConfig:
    """`embedding` is None for an LLM alone, which reads text."""

    embedding: EmbeddingConfig | None
    llm: LLMConfig

    @property
    def num_tokens(self) -> int:
        """All ids that the model reads."""
        return self.embedding.num_tokens if self.embedding else self.llm.vocab_size

    def check(self) -> None:
        self.llm.stack.check("model.llm.stack")
        if self.embedding is None:
            return
        self.embedding.check()
        if self.embedding.stack.width != self.llm.stack.width:
            raise UserError(
                f"model: the embedding's width {self.embedding.stack.width} must equal the LLM's {self.llm.stack.width}"
            )
        # It may know more: tokens that are read and never written, as those of images over a text-only LLM.
        if self.embedding.num_tokens < self.llm.vocab_size:
            raise UserError(
                f"model: the embedding knows {self.embedding.num_tokens} tokens (vocab_size + num_special_tokens) and "
                f"the LLM writes {self.llm.vocab_size}; raise model.embedding.num_special_tokens to "
                f"{self.llm.vocab_size - self.embedding.vocab_size}"
            )


VISION_POOLINGS = ("class", "mean", "map")
TEXT_POOLINGS = ("end", "highest", "last", "first")
PROJECTIONS = ("linear", "bias", "none")  # 'bias': with a bias
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A vision transformer that serves as InternViT and as CLIP's image tower.

    Attributes:
      image_size, patch_size: pixels along one side of the image, and of a patch.
      width, num_layers, num_heads: of the transformer.
      mlp_width: inside the MLP.
      norm: 'layer_norm' or 'rms_norm'.
      norm_eps: added to the variance.
      activation: of the MLP: 'gelu', 'gelu_tanh' or 'quick_gelu'.
      qkv_bias, patch_bias: biases of the attention's inputs and of the patches' projection.
      layer_scale, qk_norm: InternViT's options; qk_norm is an RMSNorm over all heads together.
      pre_norm: LayerNorm after the positions (CLIP's ln_pre).
      post_norm: LayerNorm after the layers (CLIP's ln_post), without which the tower pools nothing.
      norm_tokens: it is of all tokens, before they are pooled (SigLIP); False: of what was pooled (CLIP).
      pooling: of VISION_POOLINGS: the class token, the mean of the patches, or SigLIP's MAP head, whose learned probe
        attends to all tokens.
      class_token: whether a learned token stands before the patches.
      image_mean, image_std: the tower's own normalisation of [0, 1] pixels.
    """

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    norm: str = "layer_norm"
    norm_eps: float = 1e-6
    activation: str = "gelu"
    qkv_bias: bool = True
    patch_bias: bool = True
    layer_scale: bool = True
    qk_norm: bool = False
    pre_norm: bool = False
    post_norm: bool = False
    norm_tokens: bool = False
    pooling: str = "class"
    class_token: bool = True
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def grid(self) -> int:
        """Patches along one side; pixels that are left make none."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """The tokens that its layers see."""
        return self.grid**2 + self.class_token


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
      frozen: training: what stays as it was loaded, of CLIP_PARTS, with commas; 'vision' is LiT's locked tower.
      vision_projection, text_projection: of PROJECTIONS; a tower without one has the width of the space itself.
      family: whose names and layout its public checkpoint has: 'clip' and 'siglip' are Hugging Face's, 'open_clip' and
        'open_clip_custom' (whose text tower has a prefix) open_clip's.
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
    frozen: str = ""
    vision_projection: str = "linear"
    text_projection: str = "linear"
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
        v, t = self.vision, self.text
        choices = {
            "text.pooling": (t.pooling, TEXT_POOLINGS),
            "vision_projection": (self.vision_projection, PROJECTIONS),
        }
        choices |= {"text_projection": (self.text_projection, PROJECTIONS)}
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


TEACHER_PROJECTORS = ("mlp1", "linear")


@dataclasses.dataclass(frozen=True)
class TeacherKind:
    """What is special about a kind of teacher tower.

    Attributes:
      unused_layers: its last ones, which a teacher does not run: the patches of a contrastive tower's last layer get no
        training signal.
      projectors: of TEACHER_PROJECTORS, those that it may have.
      component: the component of a finished model that its weights come from.
    """

    unused_layers: int = 0
    projectors: tuple[str, ...] = TEACHER_PROJECTORS
    component: str = "teacher"


TEACHER_KINDS = {
    "internvit": TeacherKind(),
    "clip": TeacherKind(unused_layers=1, projectors=("linear",), component="clip"),
}


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """The image target of distillation: a tower, its 2x2 pixel shuffle, and what brings it to the student's width.

    Attributes:
      kind: of TEACHER_KINDS.
      vision: the whole tower as trained.
      projector: 'mlp1' = InternVL2's own projector (a part of the teacher); 'linear' = none on the teacher and a head
        on the student, dropped after the stage.
      projector_width: of what 'mlp1' gives: the student's width.
    """

    kind: str
    vision: ViTConfig
    projector: str = "linear"
    projector_width: int = 0

    @property
    def num_layers(self) -> int:
        """Layers that the teacher runs."""
        return self.vision.num_layers - TEACHER_KINDS[self.kind].unused_layers

    def check(self, width: int) -> None:
        """Whether it can teach a student of this width."""
        if self.kind not in TEACHER_KINDS:
            raise UserError(f"teacher.kind={self.kind!r}: use one of {', '.join(TEACHER_KINDS)}")
        allowed = TEACHER_KINDS[self.kind].projectors
        if self.projector not in allowed:
            raise UserError(f"teacher.projector={self.projector!r}: a {self.kind} tower has {' or '.join(allowed)}")
        if self.projector == "mlp1" and self.projector_width != width:
            raise UserError(
                f"teacher.projector_width={self.projector_width} must be the student's width {width}; "
                "take a teacher beside an LLM of that width, or projector='linear'"
            )
