"""Which tokenizer a run reads text with."""

import pathlib
from collections.abc import Mapping, Sequence

from hovle_jax.config import RunConfig
from hovle_jax.data import pipeline
from hovle_jax.data.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from hovle_jax.errors import UserError
from hovle_jax.training.stages import STAGES


def choose_tokenizer(
    config: RunConfig, folders: Sequence[pathlib.Path], sources: Sequence[pathlib.Path], corpus: pipeline.Corpus
) -> Tokenizer:
    """The tokenizer of one of these folders (the run's own, its sources'), the configured one, or one trained here."""
    place = next((place for place in (*folders, *sources) if has_tokenizer(place)), config.tokenizer.path)
    if place == "required":
        raise UserError(
            f"the preset {config.preset!r} reads text as its public LLM does, and {' and '.join(map(str, sources))} "
            "have no tokenizer; give that LLM's SentencePiece model with --config.tokenizer.path=FILE"
        )
    tokenizer = load_tokenizer(place) if place else pipeline.train_tokenizer(config, corpus)
    # A public LLM's has no image tokens.
    return tokenizer.with_image_tokens() if "embedding" in STAGES[config.stage].components else tokenizer


def texts_read_by(config: RunConfig, sources: Mapping[str, pathlib.Path]) -> list[pathlib.Path]:
    """Of the folders {component: folder} that a run starts from, those that read text: a tower alone has no say."""
    parts = config.init.parts_of_clip
    return [folder for name, folder in sources.items() if not (name == "clip" and parts and "text" not in parts)]
