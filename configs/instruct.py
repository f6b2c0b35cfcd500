"""Stage 3: everything is trained on questions and answers about images (paper, section 3.2).

    python -m hovle_jax.train --config configs/instruct.py

Runs the whole chain where the earlier stages are missing: pretrain, contrast, distill, align, instruct.

tiny: the training questions of easy-VQA; five minutes on two CPU cores, eighteen for the chain.
tiny_no_distill: the chain without stage 1, to show what distillation is for.
smol: over SmolLM2-135M-Instruct, after its own distill and align.
hovle, hovle_hd: 1.2k steps of 4096 samples, peak learning rate 4e-5.
"""

from hovle_jax import recipes


def get_config(preset="tiny"):
    config = recipes.base("instruct", preset)
    config.init.llm = "align"
    config.init.embedding = "align"
    if recipes.is_paper(preset):
        config.init.llm = config.init.embedding = "required"
        config.steps = 1_200
        config.optimizer.learning_rate = 4e-5
        config.optimizer.warmup_steps = 36
        config.data.sequence_length = 8192
        config.data.tiles = 13
        return config
    config.data.batch_size = 16
    config.easy_vqa.turns = 3
    config.easy_vqa.balanced = True
    config.easy_vqa.negated_share = 0.4
    config.easy_vqa.ask_caption = True
    config.data.sequence_length = 98
    config.data.augment = True
    config.steps = 1500
    config.optimizer.learning_rate = 4e-4
    config.optimizer.warmup_steps = 60
    config.optimizer.b2 = 0.98
    if preset == "smol":
        config.data.batch_size = 8
        config.easy_vqa.turns = 1
        config.easy_vqa.negated_share = 0.5
        config.data.sequence_length = 72
        config.steps = 150
        config.eval_limit = 200
        config.optimizer.learning_rate = 1e-4
        config.optimizer.warmup_steps = 10
    return config
