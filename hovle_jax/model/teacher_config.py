"""Sizes of a teacher: whose tower it is, and how much of it is run."""

import dataclasses

from hovle_jax.errors import UserError
from hovle_jax.model.clip_config import ResNetConfig
from hovle_jax.model.config import ViTConfig

TEACHER_PROJECTORS = ("mlp1", "linear")


@dataclasses.dataclass(frozen=True)
class TeacherKind:
    """What is special about a kind of teacher tower.

    Attributes:
      unused_layers: its last ones, which a teacher does not run: the patches of a contrastive tower's last layer get no
        training signal.
      projectors: of TEACHER_PROJECTORS, those that it may have.
      component: the component of a finished model that its weights come from.
    """

    unused_layers: int = 0
    projectors: tuple[str, ...] = TEACHER_PROJECTORS
    component: str = "teacher"


TEACHER_KINDS = {
    "internvit": TeacherKind(),
    "clip": TeacherKind(unused_layers=1, projectors=("linear",), component="clip"),
}


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """The image target of distillation: a tower, its 2x2 pixel shuffle, and what brings it to the student's width.

    Attributes:
      kind: of TEACHER_KINDS.
      vision: the whole tower as trained: a transformer, with or without a class token, or CLIP's ResNet.
      projector: 'mlp1' = InternVL2's own projector (a part of the teacher); 'linear' = none on the teacher and a head
        on the student, dropped after the stage.
      projector_width: of what 'mlp1' gives: the student's width.
      layer: after how many layers (of a ResNet: stages) the tower's patches are the target; 0 = as its kind says.
    """

    kind: str
    vision: ViTConfig | ResNetConfig
    projector: str = "linear"
    projector_width: int = 0
    layer: int = 0

    @property
    def depth(self) -> int:
        """Layers of the whole tower; of a ResNet its stages."""
        return len(self.vision.layers) if isinstance(self.vision, ResNetConfig) else self.vision.num_layers

    @property
    def num_layers(self) -> int:
        """Layers, or stages, that the teacher runs: a ResNet's pooling reads all places of its last one."""
        unused = 0 if isinstance(self.vision, ResNetConfig) else TEACHER_KINDS[self.kind].unused_layers
        return self.layer or self.depth - unused

    @property
    def width(self) -> int:
        """Numbers of a patch that the tower gives, before the pixel shuffle."""
        if isinstance(self.vision, ResNetConfig):
            return self.vision.width * 2 ** (self.num_layers + 1)
        return self.vision.width

    def check(self, width: int) -> None:
        """Whether it can teach a student of this width."""
        if self.kind not in TEACHER_KINDS:
            raise UserError(f"teacher.kind={self.kind!r}: use one of {', '.join(TEACHER_KINDS)}")
        if not 0 <= self.layer <= self.depth:
            raise UserError(f"teacher.layer={self.layer}: the tower has {self.depth} layers; 0 takes the usual one")
        allowed = TEACHER_KINDS[self.kind].projectors
        if self.projector not in allowed:
            raise UserError(f"teacher.projector={self.projector!r}: a {self.kind} tower has {' or '.join(allowed)}")
        if self.projector == "mlp1" and self.projector_width != width:
            raise UserError(
                f"teacher.projector_width={self.projector_width} must be the student's width {width}; "
                "take a teacher beside an LLM of that width, or projector='linear'"
            )
        if self.projector == "mlp1" and self.num_layers != self.depth:
            raise UserError(
                f"teacher.layer={self.layer}: the projector 'mlp1' reads the last layer; set 0, or projector='linear'"
            )
