"""The LLM alone, on text: next-token cross-entropy."""

from hovle_jax.components import Models
from hovle_jax.data.kinds import TEXT
from hovle_jax.training.flops import TRAINED, llm_parts
from hovle_jax.training.losses.tokens import token_losses
from hovle_jax.training.stage import Pairs, Stage


def losses(models: Models, params: dict, batch: dict) -> Pairs:
    """Cross-entropy of the tokens that follow, from the LLM's own token vectors."""
    llm = models["llm"].bind({"params": params["llm"]})
    hidden, _ = llm.run(llm.token_embedding(batch["tokens"]), batch["positions"], batch["segment_ids"])
    return token_losses(models, params, hidden, batch)


STAGE = Stage(
    components=("llm",),
    trained=(("llm",),),
    batch=TEXT,
    losses=losses,
    loss_weights={"loss": "loss_weights"},
    flops=lambda config, rows: llm_parts(config, rows, TRAINED),
    benchmark=None,
    has_held_out=True,
)
