"""Stage 0: the LLM's own pre-training on text.

    python -m hovle_jax.train --config configs/pretrain.py

tiny: the questions, answers and captions of easy-VQA; two minutes on two CPU cores.
HoVLE itself starts from a public LLM instead, so this stage has no paper recipe.
"""

from hovle_jax import recipes


def get_config(preset="tiny"):
    config = recipes.base("pretrain", preset, makes="llm")
    config.data.batch_size = 64
    config.easy_vqa.balanced = True
    config.easy_vqa.negated_share = 0.25
    config.data.sequence_length = 38
    config.steps = 550
    config.optimizer.final_fraction = 0.1
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.weight_decay = 0.1
    config.optimizer.b2 = 0.98
    return config
