"""CLIP: an image tower and a text tower, contrasted; its image tower becomes the teacher of `distill`.

    python -m hovle_jax.train --config configs/contrast.py
    python -m hovle_jax.train --config configs/contrast.py:vit_b32 --config.tokenizer.path=CLIP --config.data.source=...

tiny: 24 captions over 3,578 images of easy-VQA; two and a half minutes on two CPU cores. emoji: names and groups of
1,642 emoji in three styles; twenty minutes (docs/clip.md). vit_b32, vit_b16, vit_l14 are
OpenAI's sizes and recipe (Radford et al. 2021, table 19: 32 epochs of 400 million pairs), so400m is SigLIP's.
"""

from hovle_jax import recipes


def get_config(preset="tiny"):
    config = recipes.base("contrast", preset, makes="clip")
    if recipes.PRESETS[preset].published:
        return published(config, preset)
    if preset == "emoji":
        return emoji(config)
    config.data.batch_size = 64
    config.data.augment = True
    config.steps = 400
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.98
    return config


def emoji(config):
    config.data.source = "emoji"
    config.data.batch_size = 256
    config.data.augment = True
    config.pairs.crop_area = 0.6
    config.pairs.flip = True
    config.pairs.color_jitter = 0.5
    config.pairs.grayscale = 0.2
    config.steps = 1200
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.2
    config.optimizer.b2 = 0.98
    return config


def published(config, preset):
    siglip = preset == "so400m"
    config.steps = 390_625
    config.optimizer.learning_rate = {"so400m": 1e-3, "vit_l14": 4e-4}.get(preset, 5e-4)
    config.optimizer.warmup_steps = 2000
    config.optimizer.weight_decay = 1e-4 if siglip else 0.2
    config.optimizer.b2 = 0.95 if siglip else 0.98
    config.optimizer.eps = 1e-8 if siglip else 1e-6
    return config
