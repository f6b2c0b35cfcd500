"""Analytic FLOPs of the modules: what their matrix products need, as functions of their sizes.

Counted are two FLOPs for each multiply-add of a matrix product; norms, activations, softmax, rotations, biases and
lookups are left out, as is usual (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B). Causal attention counts the
pairs of tokens that see each other, L (L + 1) / 2 in a row of L: one segment a row, an upper bound where rows are
packed.

Letters: L tokens, D width, H heads, K kv heads, C head dim, F ffn width, P patches, S side of a patch in pixels.
"""

import dataclasses

from hovle_jax.model.clip_config import CLIPConfig, ResNetConfig, TextTowerConfig
from hovle_jax.model.config import EmbeddingConfig, LLMConfig, StackConfig, ViTConfig
from hovle_jax.model.teacher_config import TeacherConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """Forward FLOPs by what their gradient and their recomputation cost.

    Attributes:
      dense: products with weights.
      first: such products whose input needs no gradient: they read pixels.
      last: of `dense`, those that end a layer: a recomputation of the layer does not need their result.
      attention: products between activations, over the pairs that see each other.
      square: the same over all pairs.
    """

    dense: float = 0
    first: float = 0
    last: float = 0
    attention: float = 0
    square: float = 0

    def __add__(self, other):
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    def __mul__(self, times):
        return Work(*(a * times for a in dataclasses.astuple(self)))

    @property
    def forward(self) -> float:
        """Model FLOPs of a forward pass."""
        return self.dense + self.first + self.attention


def product(rows: float, inputs: float, outputs: float) -> float:
    """[rows, inputs] @ [inputs, outputs]."""
    return 2 * rows * inputs * outputs


def decoder_stack(c: StackConfig, length: int) -> Work:
    """The layers over one row of `length` tokens: GQA attention and SwiGLU."""
    matmuls, heads = decoder_matmuls(c, length), c.num_heads * c.head_dim
    return Work(
        dense=sum(matmuls.values()),
        last=matmuls["down"],
        attention=2 * product(length * (length + 1) / 2, 1, heads) * c.num_layers,
        square=2 * product(length**2, 1, heads) * c.num_layers,
    )


def decoder_matmuls(c: StackConfig, length: int) -> dict[str, float]:
    """The products with weights of all layers over one row, by name."""
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    outputs = {"query": heads, "key": kv_heads, "value": kv_heads, "output": heads}
    outputs |= dict.fromkeys(("gate", "up", "down"), c.mlp_width)
    return {name: product(length, c.width, size) * c.num_layers for name, size in outputs.items()}


def encoder_stack(
    c: ViTConfig | TextTowerConfig, num_layers: int, tokens: int, causal: bool = False, of_one: bool = False
) -> Work:
    """The layers of a tower over one sequence.

    Args:
      of_one: of the last layer one token's output is made (`vit.run_encoder`).
    """

    def layer(asking):
        down = product(asking, c.mlp_width, c.width)
        square = 2 * product(tokens * asking, 1, c.width)
        visible = (tokens + 1) / (2 * tokens) if causal and asking > 1 else 1
        dense = 2 * (product(tokens, c.width, c.width) + product(asking, c.width, c.width) + down)
        return Work(dense=dense, last=down, attention=square * visible, square=square)

    if not of_one or not num_layers:
        return layer(tokens) * num_layers
    return layer(tokens) * (num_layers - 1) + layer(1)


def patch_embedding(patches: int, patch_size: int, width: int) -> Work:
    """P patches of S x S pixels in three colours."""
    return Work(first=product(patches, 3 * patch_size**2, width))


def projector(tokens: int, inputs: int, width: int) -> Work:
    """Linear(inputs, width), activation, Linear(width, width)."""
    return Work(dense=product(tokens, inputs, width) + product(tokens, width, width))


def embedding_ends(c: EmbeddingConfig, tiles: int) -> Work:
    """What the holistic embedding does to a row's tiles besides its layers: patches and pixel-shuffle projector."""
    work = patch_embedding(tiles * c.grid**2, c.patch_size, c.stack.width)
    if c.pixel_shuffle == "none":
        return work
    return work + projector(tiles * c.tokens_per_tile, 4 * c.stack.width, c.stack.width)


def llm_head(c: LLMConfig, tokens: int) -> Work:
    """Logits over the vocabulary, without its padding."""
    return Work(dense=product(tokens, c.stack.width, c.vocab_size))


def teacher(c: TeacherConfig, tokens_per_tile: int) -> Work:
    """One tile through the tower and, where it has one, InternVL2's projector."""
    v = c.vision
    if isinstance(v, ResNetConfig):
        return resnet(v, c.num_layers)
    work = patch_embedding(v.grid**2, v.patch_size, v.width) + encoder_stack(v, c.num_layers, v.num_tokens)
    if c.projector != "mlp1":
        return work
    return work + projector(tokens_per_tile, 4 * v.width, c.projector_width)


def clip_vision_layers(c: CLIPConfig) -> Work:
    """Of one image, the layers of a transformer; a ResNet counts as an end."""
    v = c.vision
    if isinstance(v, ResNetConfig):
        return Work()
    return encoder_stack(v, v.num_layers, v.num_tokens - v.grid**2 + c.kept_patches, of_one=v.pooling == "class")


def clip_vision_ends(c: CLIPConfig) -> Work:
    """Of one image, besides the layers: patches, a MAP head, and the projection of what is pooled."""
    v = c.vision
    if isinstance(v, ResNetConfig):
        return resnet(v) + resnet_pool(v, c.projection_width)
    work = patch_embedding(v.grid**2, v.patch_size, v.width)
    if v.pooling == "map":
        work += attention_pool(v.num_tokens, v.width) + Work(dense=2 * product(1, v.width, v.mlp_width))
    return work if c.vision_projection == "none" else work + Work(dense=product(1, v.width, c.projection_width))


def clip_text_layers(c: CLIPConfig) -> Work:
    """Of one text, the layers."""
    return encoder_stack(c.text, c.text.num_layers, c.text.context, c.text.causal, of_one=True)


def clip_text_ends(c: CLIPConfig) -> Work:
    """Of one text, besides the layers: its projection."""
    return Work() if c.text_projection == "none" else Work(dense=product(1, c.text.width, c.projection_width))


def attention_pool(tokens: int, width: int) -> Work:
    """One query over so many tokens, and its output."""
    dense = 2 * product(tokens, width, width) + 2 * product(1, width, width)
    return Work(dense=dense, attention=2 * product(tokens, 1, width), square=2 * product(tokens, 1, width))


def resnet(c: ResNetConfig, stages: int = 4) -> Work:
    """One image through so many stages of CLIP's ResNet, without its pooling.

    A convolution of k x k multiplies k^2 inputs at each place that it puts out.
    """
    places, half = (c.image_size // 2) ** 2, c.width // 2
    dense, inputs = product(places, 9 * half, half) + product(places, 9 * half, c.width), c.width
    for stage, blocks in enumerate(c.layers[:stages]):
        places, width = (c.image_size // 2 ** (stage + 2)) ** 2, c.width * 2**stage
        for i in range(blocks):
            before = places * 4 if stage and not i else places  # the stride comes after the second convolution
            dense += product(before, inputs, width) + product(before, 9 * width, width)
            dense += product(places, width, 4 * width) + (0 if i else product(places, inputs, 4 * width))
            inputs = 4 * width
    return Work(first=product((c.image_size // 2) ** 2, 27, half), dense=dense)


def resnet_pool(c: ResNetConfig, features: int) -> Work:
    """Its attention over the last feature map, whose output is the projection."""
    other = product(1, c.channels, features) - product(1, c.channels, c.channels)
    return Work(dense=other) + attention_pool(c.grid**2 + 1, c.channels)
