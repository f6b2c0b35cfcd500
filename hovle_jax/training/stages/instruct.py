"""Stage 3 of HoVLE: everything is trained on questions and answers about images (paper, section 3.2)."""

from hovle_jax.data.kinds import CONVERSATIONS
from hovle_jax.training.flops import TRAINED, embedding_parts, llm_parts
from hovle_jax.training.losses.tokens import answer_losses
from hovle_jax.training.stage import Stage

STAGE = Stage(
    components=("embedding", "llm"),
    trained=(("embedding",), ("llm",)),
    batch=CONVERSATIONS,
    losses=answer_losses,
    loss_weights={"loss": "loss_weights"},
    flops=lambda config, rows: embedding_parts(config, rows) + llm_parts(config, rows, TRAINED),
    benchmark="easy_vqa",
    has_held_out=False,
)
