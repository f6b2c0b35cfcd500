"""Stage 1: the holistic embedding learns to see from a frozen teacher, and to pass text through, on unpaired
images and random text (paper, section 3.2).

    python -m hovle_jax.train --config configs/distill.py
    python -m hovle_jax.train --config configs/distill.py:hovle --config.init.llm=DIR --config.init.teacher=DIR

tiny: the images of easy-VQA, the CLIP tower of `contrast`; three minutes on two CPU cores.
smol: the same over SmolLM2-135M-Instruct; a quarter of an hour.
hovle, hovle_hd: the paper's 122k steps of 4096 images, peak learning rate 3e-4.
"""

from hovle_jax import recipes


def get_config(preset="tiny"):
    config = recipes.base("distill", preset)
    config.init.llm = "pretrain"
    config.init.teacher = "contrast"
    if recipes.is_paper(preset):
        config.init.llm = config.init.teacher = "required"
        config.steps = 122_000
        config.optimizer.learning_rate = 3e-4
        config.data.sequence_length = 4096
        config.data.tiles = 13
        return config
    config.data.batch_size = 8
    config.data.tiles = 8
    config.data.sequence_length = 260
    config.data.augment = True
    config.steps = 500
    config.eval_rows = 256
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 40
    config.optimizer.b2 = 0.98
    if preset == "smol":
        config.init.llm = "smol-llm"
        config.init.pass_through = True
        config.data.tiles = 4
        config.data.sequence_length = 196
        config.steps = 300
        config.optimizer.learning_rate = 1e-3
        config.optimizer.warmup_steps = 20
    return config
