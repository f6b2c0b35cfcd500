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
