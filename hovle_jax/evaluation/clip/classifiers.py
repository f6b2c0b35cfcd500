"""Models that choose among named classes without having learned them: a CLIP or SigLIP, or HoVLE itself.

Letters: N images, C classes.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip import options
from hovle_jax.evaluation.clip.class_names import check_names
from hovle_jax.evaluation.clip.class_vectors import class_vectors
from hovle_jax.evaluation.clip.likelihood import DEFAULT_PROMPT, LikelihoodClassifier
from hovle_jax.evaluation.clip.templates import DEFAULT, find_templates
from hovle_jax.inference.dtype_option import DTYPE
from hovle_jax.inference.encoder import BATCH, Encoder
from hovle_jax.inference.folders import check_model_folder
from hovle_jax.inference.load import load_run
from hovle_jax.model import flops

TOWERS, ANSWERING = ("clip",), ("embedding", "llm")


class Classifier(Protocol):
    """What gives images probabilities of classes."""

    @property
    def kind(self) -> str:
        """Of KINDS: what the probabilities are."""
        ...

    @property
    def at_once(self) -> int:
        """Images that fill a batch."""
        ...

    def reduced(self, image: Any) -> Any:
        """What of an image has to wait in memory for its batch; `probabilities` takes it in the image's place."""
        ...

    def probabilities(self, images: Sequence) -> np.ndarray:
        """Pillow images or [H, W, 3] uint8 -> [N, C] float32; a larger one is likelier."""
        ...

    def flops(self) -> float:
        """Forward FLOPs of one image."""
        ...


KINDS = {
    "softmax": "a softmax over the classes, which sum to 1",
    "sigmoid": "a sigmoid for each class by itself, so that none or several may be likely",
    "likelihood": "a softmax over the mean log-likelihood of a token of each class's name as the answer",
}


@dataclasses.dataclass(frozen=True)
class ClipClassifier:
    """A CLIP or SigLIP with the vectors of its classes.

    Attributes:
      vectors: [C, E] float32 unit vectors.
    """

    encoder: Encoder
    vectors: np.ndarray

    @property
    def kind(self) -> str:
        """'sigmoid' for a model that was trained so."""
        return self.encoder.config.loss

    @property
    def at_once(self) -> int:
        """Rows of the encoder's batches."""
        return self.encoder.rows

    def reduced(self, image: Any) -> np.ndarray:
        """The tower's square, which is not resized again."""
        return self.encoder.shape.resizing.tile(image)

    def probabilities(self, images: Sequence) -> np.ndarray:
        """See `Classifier`."""
        return probabilities(self.encoder, self.encoder.images(images), self.vectors)

    def flops(self) -> float:
        """Of the image tower; the product with the classes is next to nothing."""
        config = dataclasses.replace(self.encoder.config, patch_dropout=0.0)  # which training alone has
        return (flops.clip_vision_layers(config) + flops.clip_vision_ends(config)).forward


def probabilities(encoder: Encoder, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Unit vectors [N, E] and [C, E] -> [N, C] float32: of a softmax of the scaled cosines, or of their sigmoids."""
    logits = encoder.scale * (images @ classes.T).astype(np.float64) + encoder.bias
    made = _sigmoid(logits) if encoder.config.loss == "sigmoid" else softmax(logits)
    return made.astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _sigmoid(logits):
    return np.exp(-np.logaddexp(0.0, -logits))  # which does not overflow


@dataclasses.dataclass(frozen=True)
class Asked:
    """How a model is to classify.

    Attributes:
      templates: a set of `templates.SETS` or a file; a CLIP's.
      prompt: the question about the image; HoVLE's.
      batch_size: rows of a batch.
      dtype: as in `load_run`.
      max_tiles: of an image, for HoVLE; None = as in training.
    """

    templates: str = ""
    prompt: str = DEFAULT_PROMPT
    batch_size: int = BATCH
    dtype: str = ""
    max_tiles: int | None = None

    def about(self, kind: str) -> dict[str, Any]:
        """What scores depend on, besides the model and the images."""
        return {"prompt": self.prompt} if kind == "likelihood" else {"templates": self.templates or DEFAULT}

    @classmethod
    def of_flags(cls, max_tiles: int | None = None) -> "Asked":
        """As the flags of a command say. Raises UserError for templates that are none."""
        if DTYPE.value == "int8":
            raise UserError("--dtype int8 is for answers; classes are scored in float32 or bfloat16")
        find_templates(options.TEMPLATES.value)
        prompt = options.PROMPT.value or DEFAULT_PROMPT
        return cls(options.TEMPLATES.value, prompt, options.BATCH_SIZE.value, DTYPE.value, max_tiles)

    def check(self, folder: str | os.PathLike) -> None:
        """Raises UserError where the folder holds no model that classifies, or the templates are none."""
        find_templates(self.templates)
        parts_of(folder)

    def open(
        self, folder: str | os.PathLike, names: Sequence[str], say: Callable[[str], None] | None = None
    ) -> Classifier:
        """The model in a folder, of a finished run or an import, with the classes that it chooses among.

        Raises:
          UserError: no such folder, or it holds neither towers nor what answers, or no tokenizer.
        """
        check_names(names, "--labels")
        if len(names) < 2:
            raise UserError(f"{len(names)} class{'es' * (len(names) != 1)} leave nothing to choose: give two or more")
        templates, parts = find_templates(self.templates), parts_of(folder)
        if parts == ANSWERING:
            loaded = load_run(folder, parts, self.dtype).with_max_tiles(self.max_tiles)
            return LikelihoodClassifier(loaded, tuple(names), self.prompt, self.batch_size)
        encoder = Encoder.load(folder, self.batch_size, self.dtype)
        return ClipClassifier(encoder, class_vectors(encoder, folder, names, templates, say))


def parts_of(folder: str | os.PathLike) -> tuple[str, ...]:
    """TOWERS or ANSWERING: what of a model classifies. Raises UserError if it has neither."""
    check_model_folder(pathlib.Path(folder))
    model = pathlib.Path(folder) / "model"
    for parts in (TOWERS, ANSWERING):
        if all((model / part).is_dir() for part in parts):
            return parts
    raise UserError(
        f"{folder} has neither the towers of a CLIP nor an embedding with an LLM, so it classifies no image: give a "
        "run of contrast or instruct, as runs/contrast, or an import of either kind"
    )


def rank_of(scores: np.ndarray, label: int) -> int:
    """The place of a class among scores [C], 0 for the first; of equal scores the earlier class comes first."""
    return int(np.count_nonzero(scores > scores[label]) + np.count_nonzero(scores[:label] == scores[label]))


def best(scores: np.ndarray, count: int) -> Any:
    """The classes of the largest scores [C], the largest first; of equal ones the earlier class."""
    return np.argsort(-scores, kind="stable")[:count]
