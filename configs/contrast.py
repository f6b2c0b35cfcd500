"""CLIP: an image tower and a text tower, contrasted; its image tower becomes the teacher of `distill`.

    python -m hovle_jax.train --config configs/contrast.py

tiny: 24 captions over 3,578 images of easy-VQA; two and a half minutes on two CPU cores.
"""

from hovle_jax import recipes


def get_config(preset="tiny"):
    config = recipes.base("contrast", preset, makes="clip")
    config.data.batch_size = 64
    config.data.augment = True
    config.steps = 400
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.98
    return config
