"""Frozen dataclasses of everything a run is made of; sizes of the models are in model/config.py.

A file in `configs/` returns an `ml_collections.ConfigDict` with the fields of `RunConfig`; `RunConfig.from_dict`
turns it into these classes and refuses keys that it does not know.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection
from typing import Any

from hovle_jax.errors import UserError
from hovle_jax.model.adapters import AdapterConfig
from hovle_jax.model.clip_config import CLIPConfig
from hovle_jax.model.config import EmbeddingConfig, HoVLEConfig, LLMConfig
from hovle_jax.model.teacher_config import TeacherConfig


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from.

    Attributes:
      path: a SentencePiece model; empty = trained on the data source's text by the `pretrain` run.
      vocab_size: all ids, the 11 chat and image tokens at the top included.
    """

    path: str = ""
    vocab_size: int = 0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a stage reads.

    Attributes:
      source: 'easy_vqa', another corpus by name, or data of one's own: a file, pattern or URL of one of the kinds in
        data/files/shard_kinds.py, or a meta .json that names several (docs/data.md).
      split: 'train'; the test split is never trained on.
      held_out: a source of samples that are not trained on, for held-out losses and answers in the report; empty = the
        corpus' own, if any.
      outside_root: image paths of rows may lead out of the folder that they are relative to, and to http.
      max_pixels: an image of more is a bad sample; memory for its decoding is taken 8 bytes a pixel.
      batch_size: rows of the global batch.
      sequence_length: L, tokens of a row (HD: of the short stream).
      tiles: M, image tiles of a row, at most.
      samples_per_row: how many samples a row has at most, as segments; 0 = as many as fit (easy_vqa: 1, and always as
        many as are asked for).
      augment: flips and shifts of the images, of an indexed source one JPEG compression, of pairs what `pairs` says;
        from (seed, step) alone.
      min_tiles, max_tiles, thumbnail: the grid of tiles of an image (several images of a sample share max_tiles; a
        row's `tiles` limit it too), and whether the whole image follows a grid of more than one.
      upright: turn images as their EXIF orientation says.
      loss_weights: of a sample's supervised tokens, x in number: 'token' 1, 'sample' 1/x, 'square' 1/sqrt(x).
      random_tokens: distillation: ids in the query and again in the response.
      system_message: empty = the template's own.
    """

    source: str = "easy_vqa"
    split: str = "train"
    held_out: str = ""
    outside_root: bool = False
    max_pixels: int = 2**26
    batch_size: int = 64
    sequence_length: int = 64
    tiles: int = 1
    samples_per_row: int = 0
    augment: bool = False
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    upright: bool = True
    loss_weights: str = "token"
    random_tokens: int = 50
    system_message: str = ""

    @property
    def grid_limits(self) -> tuple[int, int]:
        """(fewest, most) tiles of an image's grid, as a row's `tiles` limit them."""
        return grid_within(self.min_tiles, self.max_tiles, self.thumbnail, self.tiles)


def grid_within(fewest: int, most: int, thumbnail: bool, tiles: int) -> tuple[int, int]:
    """(fewest, most) tiles of a grid of which no image has more than `tiles`, its thumbnail included."""
    most = min(most, tiles - 1 if thumbnail and tiles > 1 else max(tiles, 1))
    return min(fewest, most), most


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """With data.augment, how the image of a pair of image and text changes (easy_vqa is flipped and shifted instead).

    Attributes:
      crop_area: a random part of the image is taken, of this share of its area at least; 1 = nearly all of it.
      flip: half of the images are mirrored.
      color_jitter: brightness, contrast and saturation are multiplied by up to 1 - and 1 + this.
      grayscale: the share of images without colours.
    """

    crop_area: float = 0.9
    flip: bool = False
    color_jitter: float = 0.0
    grayscale: float = 0.0

    def check(self) -> None:
        """Raises UserError for what is no share."""
        if not 0 < self.crop_area <= 1:
            raise UserError(f"pairs.crop_area={self.crop_area} is a share of the image; set it above 0, to 1 at most")
        for name in ("color_jitter", "grayscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"pairs.{name}={getattr(self, name)} is a share; set it between 0 and 1")


@dataclasses.dataclass(frozen=True)
class EasyVQAConfig:
    """How conversations are drawn from easy-VQA's images and their questions.

    Attributes:
      balanced: draw each conversation's first question so that its words do not give the answer away.
      negated_share: balanced: of those that ask for yes or no, how many are negated (0 to 1).
      turns: questions about one image in a conversation, at most.
      ask_caption: the conversation ends with a request for the image's caption, where that is known.
      only_captioned: leave out the images whose caption the questions do not tell (one in ten).
    """

    balanced: bool = False
    negated_share: float = 0.5
    turns: int = 1
    ask_caption: bool = False
    only_captioned: bool = False

    def check(self) -> None:
        """Raises UserError where nothing is left to be learned, or a share is none."""
        if not 0 <= self.negated_share <= 1:
            raise UserError(
                f"easy_vqa.negated_share={self.negated_share} is a share of questions; set it between 0 and 1"
            )
        if self.turns < (0 if self.ask_caption and self.only_captioned else 1):
            raise UserError(
                f"easy_vqa.turns={self.turns} leaves nothing to be learned; set it to at least 1 "
                "(0 will do where both easy_vqa.ask_caption and easy_vqa.only_captioned are set)"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay, after clipping by the global norm.

    Attributes:
      learning_rate: the peak, reached after the warm-up.
      warmup_steps: steps in which the rate rises from 0 to the peak.
      final_fraction: the share of the peak that is left at the last step, 0 to 1.
      weight_decay: the share of a weight that a step at rate 1 takes away; biases and norms have none.
      b1, b2: how much of the running means of gradients and of their squares a step keeps.
      eps: added to the root of the squares' mean.
      clip_norm: gradients of a greater global norm are scaled down to it.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.0
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices of a slice along each mesh axis; -1 takes what is left. Several slices multiply `data`.

    Attributes:
      data: devices along which rows of the batch are split and parameters are whole.
      fsdp: devices along which rows are split, and what execution.zero says of the state.
      tensor: devices along which heads, the MLPs' width and the vocabulary are split.
      sequence: devices along which a row's tokens are split.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How programs are run; nothing here changes a model's parameters.

    Attributes:
      dtype: compute type, 'float32' or 'bfloat16' ('auto' in a run's config: float32 on the CPU, else bfloat16).
      attention: the implementation of `attend` ('auto': splash on TPUs, cuDNN's on GPUs, blocks on CPUs).
      unroll_layers: write the layers out instead of looping over them (faster on the CPU, slower to compile).
      remat: what the backward pass recomputes: 'none', 'dots' (all but matmuls), 'full' (all but each layer's input),
        'offload' (the same, inputs waiting in the host's memory), or all but what is named, of layer_input, query, key,
        value, attention, output, gate, up, logits ('query,gate@host': the second waits in the host's memory).
      accumulate: microbatches that a step reads its batch in (gradient accumulation): less memory, the same update;
        -1 = as many as leave each device one row.
      vocab_chunk: columns of the head that the cross-entropy holds at a time; 0 = all.
      sparse_cores: on TPU v5p and v6e: their SparseCores gather and scatter while the step multiplies
        (hardware/compiler_options.py).
      scoped_vmem: on TPU v6e: fusions may use half of the vector memory, more than by default.
      int8: decoder layers multiply in int8 in the forward pass, twice as fast on TPU v5e and v6e (needs the extra
        'quantize').
      zero: what the mesh axis `fsdp` shards: 0 nothing, 1 the optimizer's moments, 2 gradients too, 3 parameters too.
    """

    dtype: str = "float32"
    attention: str = "xla"
    unroll_layers: bool = False
    remat: str = "none"
    accumulate: int = 1
    vocab_chunk: int = 0
    zero: int = 3
    sparse_cores: bool = True
    scoped_vmem: bool = False
    int8: bool = False

    def resolved(self, platform: str, accumulate: int = 1) -> "ExecutionConfig":
        """What 'auto' means on a platform: float32 on the CPU, where bfloat16 training is slow; its own attention."""
        meant = {
            "dtype": "float32" if platform == "cpu" else "bfloat16",
            "attention": {"tpu": "splash", "gpu": "cudnn", "cpu": "blocks"}.get(platform, "xla"),
        }
        meant = {name: value for name, value in meant.items() if getattr(self, name) == "auto"}
        return dataclasses.replace(self, accumulate=accumulate, **meant)


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where a component's weights come from.

    Attributes:
      llm, embedding, clip, teacher: a stage's name, the folder of a run or an import, 'smol-llm' (which is fetched),
        or empty for fresh random weights.
      clip_parts: what of init.clip is taken, of vision, text, vision_projection, text_projection, log_scale and
        logit_bias, with commas: 'vision' for a fresh text tower beside a trained image tower. Empty = all.
      pass_through: the layers of a fresh embedding start by adding nothing, so that a trained LLM reads text through
        them as it did without them.
    """

    llm: str = ""
    embedding: str = ""
    clip: str = ""
    teacher: str = ""
    clip_parts: str = ""
    pass_through: bool = False

    @property
    def parts_of_clip(self) -> tuple[str, ...]:
        """The parts of `init.clip` that are taken; empty = all."""
        return tuple(self.clip_parts.split(",")) if self.clip_parts else ()


@dataclasses.dataclass(frozen=True)
class HealthConfig:
    """What a run does about numbers that go wrong and devices that stand still.

    Attributes:
      on_bad_step: what a loss or gradient that is not finite does: 'stop' ends the run before its update, 'skip' leaves
        the update out and goes on with the next batch.
      max_skipped: updates that the whole run may leave out; one more, and it stops.
      spike_sigmas: leave out the update of a loss so many standard deviations above the mean of the last 128 (6 is
        usual); 0 = never.
      watchdog_seconds: without the end of a step for so long, and for ten times the usual, each host writes where its
        threads stand to RUN/stacks-HOST.txt; 0 = never.
      on_hang: what happens then: 'wait' goes on waiting, 'stop' ends the process.
    """

    on_bad_step: str = "stop"
    max_skipped: int = 10
    spike_sigmas: float = 0.0
    watchdog_seconds: float = 600.0
    on_hang: str = "wait"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One training run."""

    stage: str  # which training stage: a file of configs/
    preset: str  # which models and recipe: tiny, smol, hovle, ...
    model: HoVLEConfig
    clip: CLIPConfig | None
    teacher: TeacherConfig | None
    tokenizer: TokenizerConfig
    data: DataConfig
    optimizer: OptimizerConfig
    init: InitConfig
    mesh: MeshConfig = MeshConfig()
    execution: ExecutionConfig = ExecutionConfig(dtype="auto", attention="auto")
    health: HealthConfig = HealthConfig()
    adapter: AdapterConfig = AdapterConfig()
    seed: int = 0  # of weights, order and augmentation
    steps: int = 1000  # optimizer steps, and the length of the learning rate's schedule
    easy_vqa: EasyVQAConfig = EasyVQAConfig()
    pairs: PairsConfig = PairsConfig()
    stop_at_step: int = 0  # end early (0: never); the schedule keeps its length
    log_every: int = 20  # steps between two lines and two rows of metrics
    eval_every: int = 0  # held-out metrics between the first and the last step (0: only at both ends)
    eval_rows: int = 0  # held-out rows that the held-out losses are of, the first so many (0: all)
    eval_limit: int = 0  # questions or images of the benchmark at the end (0: all)
    checkpoint_every: int = 500  # steps between two checkpoints
    keep_checkpoints: int = 2  # how many of the newest stay
    keep_every: int = 0  # checkpoints whose step divides by it stay too (0: none)
    keep_best: str = ""  # a held-out metric, 'loss': the checkpoint where it was lowest stays too ('max:NAME': highest)
    workers: int = 0  # processes that prepare batches (0: threads of this one)
    worker_timeout: float = 300.0  # seconds that such a process may take for a row, then it is started anew (0: any)
    bad_ceiling: float = 0.01  # the share of samples that may be unusable before the run stops

    @classmethod
    def from_dict(cls, mapping: dict) -> "RunConfig":
        """Reads older files too (`MOVED`). Raises UserError for a key or a type that is not known."""
        return from_dict(cls, _renewed(mapping), "config")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def model_config(self) -> "ModelConfig":
        """The sizes of all that the run may hold, run as it is."""
        min_tiles, max_tiles = self.data.grid_limits
        return ModelConfig(
            embedding=self.model.embedding,
            llm=self.model.llm,
            clip=self.clip,
            teacher=self.teacher,
            system_message=self.data.system_message,
            execution=self.execution,
            adapter=self.adapter,
            min_tiles=min_tiles,
            max_tiles=max_tiles,
            thumbnail=self.data.thumbnail,
        )

    @property
    def last_step(self) -> int:
        """The step at which a process stops at the latest."""
        return min(self.stop_at_step or self.steps, self.steps)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A finished model: the sizes of the components that its folder holds, and how it is talked to.

    Attributes:
      system_message: empty = the template's own.
      execution: how it is run by default.
      adapter: of a run that trains adapters; a finished model has them merged.
      min_tiles, max_tiles, thumbnail: how an image becomes tiles, as in training (`DataConfig`). The defaults are those
        of InternVL's chat, for folders that do not say.
    """

    embedding: EmbeddingConfig | None = None
    llm: LLMConfig | None = None
    clip: CLIPConfig | None = None
    teacher: TeacherConfig | None = None
    system_message: str = ""
    execution: ExecutionConfig = ExecutionConfig(dtype="auto", attention="auto")
    adapter: AdapterConfig = AdapterConfig()
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True

    def only(self, components: Collection[str]) -> "ModelConfig":
        """A finished model of these components alone, run as one that answers."""
        others = {"embedding", "llm", "clip", "teacher"} - set(components)
        execution = dataclasses.replace(self.execution, remat="none", accumulate=1)
        return dataclasses.replace(self, **dict.fromkeys(others), execution=execution, adapter=AdapterConfig())

    @property
    def model(self) -> HoVLEConfig:
        """The embedding over the LLM; the LLM alone where there is no embedding."""
        assert self.llm is not None
        return HoVLEConfig(self.embedding, self.llm)

    def with_max_tiles(self, tiles: int | None) -> "ModelConfig":
        """The same with another limit to the tiles of an image's grid; None changes nothing."""
        if tiles is None:
            return self
        return dataclasses.replace(self, min_tiles=min(self.min_tiles, tiles), max_tiles=tiles)


# Where the keys of older RUN/config.json files are now, and what their stage meant before it was a key.
MOVED = {("data", key): ("easy_vqa", key) for key in ("balanced", "negated_share", "turns", "ask_caption")}
MEANT = {"align": {"only_captioned": True}}


def _renewed(mapping: dict) -> dict:
    """A config of an older run as it would be written today; a newer one as it is."""
    renewed: dict[str, Any] = {k: dict(value) if isinstance(value, dict) else value for k, value in mapping.items()}
    has = lambda part, key: isinstance(renewed.get(part), dict) and key in renewed[part]
    moved = [(old, new) for old, new in MOVED.items() if has(*old)]
    if moved and "easy_vqa" not in renewed:
        renewed["easy_vqa"] = dict(MEANT.get(renewed.get("stage", ""), {}))
    for (old_part, old_key), (part, key) in moved:
        renewed[part][key] = renewed[old_part].pop(old_key)
    return renewed


# What may differ between a run and its resumption: nothing that shapes the numbers.
RUN_ONLY_KEYS = (
    "preset",  # a name alone: what it stands for is in the other keys
    "stop_at_step",
    "log_every",
    "eval_every",
    "eval_rows",
    "eval_limit",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "keep_best",
    "workers",
    "worker_timeout",
    "bad_ceiling",
    "mesh",
    "execution",  # but for its dtype: training/resumption.py
    "health",
)


def from_dict(cls: type, mapping: Any, path: str = "config") -> Any:
    """A frozen dataclass from a nested mapping.

    Raises:
      UserError: an unknown or missing key, with the nearest known ones, or a value of another type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    try:
        items = dict(mapping).items()
    except (TypeError, ValueError):
        raise UserError(f"{path}={mapping!r} should be an object with keys") from None
    for key, value in items:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=3) or sorted(fields)
            raise UserError(f"{path}.{key} is not a known key; did you mean {', '.join(near)}?")
        values[key] = _convert(hints[key], value, f"{path}.{key}")
    required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(values))
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    return cls(**values)


def _convert(hint, value, path):
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = _fitting([h for h in typing.get_args(hint) if h is not type(None)], value)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else from_dict(typing.cast(type, hint), value, path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}={value!r} should be a list")
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{path}={value!r} should be of type {hint.__name__}")
    return value


def _fitting(hints, value):
    """Of several dataclasses the first that has all keys of a mapping; else the first of all."""
    keys = set(value) if hasattr(value, "keys") else None
    fits = lambda hint: keys is not None and keys <= {f.name for f in dataclasses.fields(hint)}
    return hints[0] if len(hints) == 1 else next((h for h in hints if isinstance(value, h) or fits(h)), hints[0])


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted paths at which two nested dicts differ, with both values: [(path, old, new)]."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        as_list = lambda v: list(v) if isinstance(v, (list, tuple)) else v  # JSON has no tuples
        return [] if as_list(old) == as_list(new) else [(path, old, new)]
    found = []
    for key in sorted(old.keys() | new.keys()):
        found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return found
