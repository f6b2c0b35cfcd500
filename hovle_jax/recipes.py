"""What the files of configs/ have in common: a ConfigDict with every field of RunConfig and a preset's sizes."""

import dataclasses

from ml_collections import ConfigDict

from hovle_jax.config import (
    DataConfig,
    EasyVQAConfig,
    ExecutionConfig,
    HealthConfig,
    InitConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
)
from hovle_jax.errors import UserError
from hovle_jax.model.presets import CLIPS, MODELS, TEACHERS


@dataclasses.dataclass(frozen=True)
class Preset:
    """Names of sizes in model/presets.py, and what is not trained here.

    Attributes:
      clip: None = the teacher is a public tower.
      public: components that come as public weights, so that no stage makes them.
      only: the one stage that it is for; empty = all.
      published: whether it is a CLIP of a published size, for a pod, with its public tokenizer.
    """

    model: str
    clip: str | None
    teacher: str
    public: tuple[str, ...] = ()
    only: str = ""
    published: bool = False


PUBLISHED = ("vit_b32", "vit_b16", "vit_l14", "so400m")
PRESETS = {
    "tiny": Preset("tiny", "tiny", "tiny"),
    "tiny_no_distill": Preset("tiny", "tiny", "tiny"),
    "smol": Preset("smol", "tiny", "tiny", public=("llm",)),
    "hovle": Preset("hovle", None, "hovle", public=("llm", "clip")),
    "hovle_hd": Preset("hovle_hd", None, "hovle", public=("llm", "clip")),
    "emoji": Preset("tiny", "emoji", "tiny", only="contrast"),
    **{name: Preset("tiny", name, "tiny", only="contrast", published=True) for name in PUBLISHED},
}
TINY_SYSTEM = "Answer."


def is_paper(preset: str) -> bool:
    """Whether the preset is one of the paper's models."""
    return preset.startswith("hovle")


def base(stage: str, preset: str, makes: str = "") -> ConfigDict:
    """The defaults of a stage under a preset, to be completed by its config file.

    Args:
      makes: the component that the stage makes from nothing, if any.
    Raises:
      UserError: an unknown preset, or one without this stage.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; use one of {', '.join(PRESETS)}")
    sizes = PRESETS[preset]
    if sizes.only and stage != sizes.only:
        raise UserError(
            f"the preset {preset!r} has no {stage} stage: it is a CLIP, which {sizes.only} trains; use "
            f"configs/{sizes.only}.py, or another preset"
        )
    if makes in sizes.public:
        raise UserError(
            f"the preset {preset!r} has no {stage} stage: it starts from public weights; "
            "use configs/distill.py, or the preset tiny"
        )
    model, clip = MODELS[sizes.model](), CLIPS[sizes.clip]() if sizes.clip else None
    config = RunConfig(
        stage=stage,
        preset=preset,
        model=model,
        clip=clip,
        teacher=TEACHERS[sizes.teacher](),
        # A tokenizer that is trained here; over a public LLM it is CLIP's alone.
        tokenizer=TokenizerConfig(vocab_size=clip.text.vocab_size if clip else model.llm.vocab_size),
        data=DataConfig(system_message="" if is_paper(preset) else TINY_SYSTEM),
        easy_vqa=EasyVQAConfig(),
        optimizer=OptimizerConfig(),
        init=InitConfig(),
        mesh=MeshConfig(),
        health=HealthConfig(),
        # Written-out layers are faster on the CPU; a loop compiles in the same time at any depth.
        execution=ExecutionConfig(dtype="auto", attention="auto", unroll_layers=preset.startswith(("tiny", "emoji"))),
    )
    if sizes.published:
        config = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, batch_size=32768),
            execution=dataclasses.replace(config.execution, remat="full"),
            mesh=MeshConfig(data=-1, fsdp=1),
            tokenizer=dataclasses.replace(config.tokenizer, path="required"),
            log_every=10,
        )
    if is_paper(preset):
        data = dataclasses.replace(config.data, batch_size=4096)
        execution = dataclasses.replace(config.execution, remat="full", vocab_chunk=8448, accumulate=-1)
        mesh = MeshConfig(data=1, fsdp=-1)
        tokenizer = dataclasses.replace(config.tokenizer, path="required")
        config = dataclasses.replace(
            config, data=data, execution=execution, mesh=mesh, tokenizer=tokenizer, log_every=10
        )
    return ConfigDict(dataclasses.asdict(config))
