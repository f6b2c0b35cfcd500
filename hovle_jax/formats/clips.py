"""The CLIP of a checkpoint, in any layout: the one place that knows them all."""

import dataclasses
from collections.abc import Callable
from typing import Any

from hovle_jax.formats import hf_clip, open_clip
from hovle_jax.formats.mapping import Rule
from hovle_jax.model.clip_config import CLIPConfig


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a CLIP lies in a folder.

    Attributes:
      config_file: the name of its config.
      stem: what the names of its weights' files begin with.
      config_from_json, config_to_json, rules: as in the other modules of formats/.
    """

    config_file: str
    stem: str
    config_from_json: Callable[[dict[str, Any], str], CLIPConfig]
    config_to_json: Callable[[CLIPConfig], dict[str, Any]]
    rules: Callable[[CLIPConfig], list[Rule]]


HUGGING_FACE = Layout("config.json", "model", hf_clip.config_from_json, hf_clip.config_to_json, hf_clip.rules)
OPEN_CLIP = Layout(
    open_clip.CONFIG, open_clip.STEM, open_clip.config_from_json, open_clip.config_to_json, open_clip.rules
)
LAYOUTS = {"clip": HUGGING_FACE, "siglip": HUGGING_FACE, "open_clip": OPEN_CLIP, "open_clip_custom": OPEN_CLIP}


def layout_of(config: CLIPConfig) -> Layout:
    """The layout of the checkpoint that it came from; a trained model's is Hugging Face's."""
    return LAYOUTS[config.family]


def rules(config: CLIPConfig) -> list[Rule]:
    """The rules of `CLIP`."""
    return layout_of(config).rules(config)


def in_layout(config: CLIPConfig, layout: Layout) -> CLIPConfig:
    """The config of the same model as a checkpoint of a layout."""
    if layout is layout_of(config):
        return config
    if layout is OPEN_CLIP:
        return dataclasses.replace(config, family="open_clip")
    family = "siglip" if config.has_bias else "clip"
    return dataclasses.replace(config, family=family, scalar_scale=family == "clip")
