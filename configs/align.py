"""Stage 2: the embedding learns to speak to the frozen LLM, on images with captions (paper, section 3.2).

    python -m hovle_jax.train --config configs/align.py

tiny: questions of easy-VQA, first one that is rarely negated, then the caption; three minutes on two CPU cores.
tiny_no_distill: the same without stage 1, to show what distillation is for.
smol: over SmolLM2-135M-Instruct; a quarter of an hour, a start and not a result (docs/training.md).
hovle, hovle_hd: 12k steps of 4096 samples, peak learning rate 5e-5.
"""

from hovle_jax import recipes


def get_config(preset="tiny"):
    config = recipes.base("align", preset)
    config.easy_vqa.turns = 0
    config.easy_vqa.ask_caption = True
    config.easy_vqa.only_captioned = True
    config.init.llm = "pretrain"
    config.init.embedding = "" if preset == "tiny_no_distill" else "distill"
    if recipes.is_paper(preset):
        config.init.llm = "required"
        config.steps = 12_000
        config.optimizer.learning_rate = 5e-5
        config.data.sequence_length = 4096
        config.data.tiles = 13
        return config
    config.data.batch_size = 16
    config.easy_vqa.turns = 3
    config.easy_vqa.balanced = True
    config.easy_vqa.negated_share = 0.15
    config.data.sequence_length = 98
    config.data.augment = True
    config.steps = 800
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 40
    config.optimizer.b2 = 0.98
    if preset == "smol":
        config.init.llm = "smol-llm"
        config.data.batch_size = 8
        config.easy_vqa.turns = 1
        config.easy_vqa.negated_share = 0.5
        config.data.sequence_length = 72
        config.steps = 150
        config.eval_limit = 200
        config.optimizer.learning_rate = 5e-4
        config.optimizer.warmup_steps = 10
    return config
