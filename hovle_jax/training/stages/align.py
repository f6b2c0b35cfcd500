"""Stage 2 of HoVLE: the embedding learns to speak to the frozen LLM (paper, section 3.2)."""

from hovle_jax.data.kinds import CONVERSATIONS
from hovle_jax.training.flops import THROUGH, embedding_parts, llm_parts
from hovle_jax.training.losses.tokens import answer_losses
from hovle_jax.training.stage import Stage

STAGE = Stage(
    components=("embedding", "llm"),
    trained=(("embedding",),),
    through=("llm",),
    batch=CONVERSATIONS,
    losses=answer_losses,
    loss_weights={"loss": "loss_weights"},
    flops=lambda config, rows: embedding_parts(config, rows) + llm_parts(config, rows, THROUGH),
    benchmark="easy_vqa_captions",
    has_held_out=False,
)
