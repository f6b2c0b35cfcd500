"""THE table of stages: what each holds, trains and minimises, one file a stage."""

from hovle_jax.errors import UserError
from hovle_jax.training.stage import Stage
from hovle_jax.training.stages import align, contrast, distill, instruct, pretrain

STAGES: dict[str, Stage] = {
    "pretrain": pretrain.STAGE,
    "contrast": contrast.STAGE,
    "distill": distill.STAGE,
    "align": align.STAGE,
    "instruct": instruct.STAGE,
}


def find(name: str) -> Stage:
    """A row by its name. Raises UserError where there is none."""
    if name not in STAGES:
        raise UserError(f"stage={name!r} is not one of {', '.join(STAGES)}")
    return STAGES[name]
