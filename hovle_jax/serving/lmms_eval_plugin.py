"""What lmms-eval loads at every start, by the entry point `lmms_eval.models` of setup.py: it imports next to nothing.

lmms-eval eval --model hovle_jax --model_args pretrained=runs/instruct --tasks pope
"""

from typing import Any

NAME = "hovle_jax"
CLASS = "hovle_jax.serving.lmms_eval_model.HovleModel"


def manifest() -> Any:
    """What lmms-eval registers: its `ModelManifest` of this model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, chat_class_path=CLASS)
