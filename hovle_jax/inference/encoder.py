"""A finished CLIP or SigLIP as two functions: of images, and of texts.

    encoder = Encoder.load("runs/contrast")
    cosines = encoder.images(images) @ encoder.texts(["a cat", "a dog"]).T      # [N, 2]

What classifies, probes, retrieves and searches stands on it. Images and texts are encoded in batches of one shape,
whose rows lie on all of this machine's devices.

Letters: N images or texts, E width of the common space, D width of the image tower.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hovle_jax.components import Models
from hovle_jax.data.kinds.captions import PairShape, caption_tokens
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.inference.folders import check_model_folder
from hovle_jax.inference.load import Loaded, load_run
from hovle_jax.model.clip_config import CLIPConfig, ResNetConfig
from hovle_jax.system.batching import batched

BATCH = 64  # rows, unless another number is asked for


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A loaded CLIP.

    Attributes:
      loaded: with the component `clip` and the model's tokenizer.
      batch_size: rows that are encoded at once; rounded up to a multiple of the devices.
    """

    loaded: Loaded
    batch_size: int = BATCH

    @classmethod
    def load(cls, folder: str | os.PathLike, batch_size: int = BATCH, dtype: str = "") -> "Encoder":
        """The CLIP of a finished run or an import; dtype: as in `load_run`.

        Raises:
          UserError: no such folder, or it holds no CLIP, or no tokenizer.
        """
        check_model_folder(pathlib.Path(folder))
        return cls(load_run(folder, ("clip",), dtype), batch_size)

    @property
    def config(self) -> CLIPConfig:
        """The towers' sizes."""
        config = self.loaded.config.clip
        assert config is not None
        return config

    @property
    def tokenizer(self) -> Tokenizer:
        """The text tower's."""
        return self.loaded.tokenizer

    @functools.cached_property
    def shape(self) -> PairShape:
        """What the towers read."""
        return PairShape.of(self.config)

    @property
    def scale(self) -> float:
        """What cosines are multiplied by to be logits."""
        return float(np.exp(np.float32(self.loaded.params["clip"]["log_scale"])))

    @property
    def bias(self) -> float:
        """What is then added to them; 0 without one."""
        return float(self.loaded.params["clip"].get("logit_bias", 0.0))

    def images(self, images: Iterable, features: str = "vectors") -> np.ndarray:
        """Pillow images or [H, W, 3] uint8 -> [N, E] float32 unit vectors; see `image_batches`."""
        parts = list(self.image_batches(images, features))
        return np.concatenate(parts) if parts else np.zeros((0, self.width(features)), np.float32)

    def width(self, features: str = "vectors") -> int:
        """E, or that of the pooled features: a ResNet projects where it pools."""
        vision = self.config.vision
        is_projected = features == "vectors" or isinstance(vision, ResNetConfig)
        return self.config.projection_width if is_projected else vision.width

    def image_batches(self, images: Iterable, features: str = "vectors") -> Iterator[np.ndarray]:
        """The same batch after batch; images are taken as they are needed.

        Args:
          features: 'vectors', or 'pooled': what the tower gives before its projection, [N, D], which probes read.
        """
        for tiles in batched(map(self.shape.resizing.tile, images), self.rows):
            yield self._encoded(features, np.stack(tiles))

    def projected(self, pooled: np.ndarray) -> np.ndarray:
        """'pooled' features [N, D] -> the 'vectors' of the same images, [N, E] float32."""
        parts = [self._encoded("projected", np.stack(rows)) for rows in batched(pooled, self.rows)]
        return np.concatenate(parts) if parts else np.zeros((0, self.width()), np.float32)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> [N, E] float32 unit vectors. Texts longer than the context are cut off."""
        made = [self.text_row(text) for text in texts]
        parts = [self._encoded("texts", np.stack(rows)) for rows in batched(made, self.rows)]
        return np.concatenate(parts) if parts else np.zeros((0, self.config.projection_width), np.float32)

    def text_row(self, text: str) -> np.ndarray:
        """[context] int32: the ids of a text, padded."""
        return caption_tokens(self.shape.ids(self.tokenizer, text), self.shape.context, self.shape.pad_id)

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return -(-self.batch_size // self._shards) * self._shards

    @property
    def _shards(self):
        placement: Any = self.loaded.models.placement
        return placement.batch_shards

    def _encoded(self, what, rows):
        """[N, ...] rows, N at most those of a batch -> what the towers make of them."""
        padded = np.concatenate([rows, np.zeros((self.rows - len(rows), *rows.shape[1:]), rows.dtype)])
        placement: Any = self.loaded.models.placement
        made = _encode(self.loaded.params["clip"], placement.put_batch(padded), what=what, models=self.loaded.models)
        return np.asarray(made, np.float32)[: len(rows)]


@functools.partial(jax.jit, static_argnames=("what", "models"))
def _encode(params: Any, rows: jax.Array, *, what: str, models: Models) -> jax.Array:
    clip = models["clip"].bind({"params": params})
    if what == "texts":
        return clip.encode_texts(rows)
    if what == "projected":
        return clip.project_images(rows)
    if what == "pooled":
        return clip.image_states(rows, whole=False)[1].astype(jnp.float32)
    return clip.encode_images(rows)
