"""What the files of configs/ have in common: a ConfigDict with every field of RunConfig and a preset's sizes."""

import dataclasses

from ml_collections import ConfigDict

from hovle_jax.config import (
    DataConfig,
    EasyVQAConfig,
    ExecutionConfig,
    InitConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
)
from hovle_jax.errors import UserError
from hovle_jax.model.presets import CLIPS, MODELS, TEACHERS

# preset -> (model sizes, CLIP sizes or None, teacher)
PRESETS = {
    "tiny": ("tiny", "tiny", "tiny"),
    "tiny_no_distill": ("tiny", "tiny", "tiny"),
    "smol": ("smol", "tiny", "tiny"),
    "hovle": ("hovle", None, "hovle"),
    "hovle_hd": ("hovle_hd", None, "hovle"),
}
TINY_SYSTEM = "Answer."


def is_paper(preset):
    """Whether the preset is one of the paper's models."""
    return preset.startswith("hovle")


def no_stage(preset):
    """Stages that a preset does not have, as it starts from public weights instead of what they would give."""
    if is_paper(preset):
        return ("pretrain", "contrast")
    return ("pretrain",) if preset == "smol" else ()


def base(stage, preset):
    """The defaults of a stage under a preset, to be completed by its config file.

    Raises:
      UserError: an unknown preset, or one without this stage.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; use one of {', '.join(PRESETS)}")
    if stage in no_stage(preset):
        raise UserError(
            f"the preset {preset!r} has no {stage} stage: it starts from public weights; "
            "use configs/distill.py, or the preset tiny"
        )
    model, clip, teacher = PRESETS[preset]
    config = RunConfig(
        stage=stage,
        preset=preset,
        model=MODELS[model](),
        clip=CLIPS[clip]() if clip else None,
        teacher=TEACHERS[teacher](),
        # A tokenizer that is trained here; over a public LLM it is CLIP's alone.
        tokenizer=TokenizerConfig(vocab_size=CLIPS[clip]().text.vocab_size if clip else MODELS[model]().llm.vocab_size),
        data=DataConfig(system_message="" if is_paper(preset) else TINY_SYSTEM),
        easy_vqa=EasyVQAConfig(),
        optimizer=OptimizerConfig(),
        init=InitConfig(),
        mesh=MeshConfig(),
        # Written-out layers are faster on the CPU; a loop compiles in the same time at any depth.
        execution=ExecutionConfig(dtype="auto", attention="auto", unroll_layers=preset.startswith("tiny")),
    )
    if is_paper(preset):
        data = dataclasses.replace(config.data, batch_size=4096)
        execution = dataclasses.replace(config.execution, remat="full", vocab_chunk=8192, accumulate=-1)
        mesh = MeshConfig(data=1, fsdp=-1)
        tokenizer = dataclasses.replace(config.tokenizer, path="required")
        config = dataclasses.replace(
            config, data=data, execution=execution, mesh=mesh, tokenizer=tokenizer, log_every=10
        )
    return ConfigDict(dataclasses.asdict(config))
