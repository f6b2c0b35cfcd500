"""One stage on the micro corpus, as the command trains it: `python -m tests.killed_run STAGE WORKDIR`.

Without the stages before it, and without a benchmark's score; the report is written.

LINEAR is a stage of the tests' own, for kills by the dozen: it has a linear model, so that next to nothing is traced.
All else is what every stage goes through; only its curves are not drawn.
"""

import dataclasses
import pathlib
import sys
import time

import flax.linen as nn
import jax

from hovle_jax import train
from hovle_jax.components import COMPONENTS
from hovle_jax.config import RunConfig
from hovle_jax.corpora import loading
from hovle_jax.evaluation import summary
from hovle_jax.hosts import distributed, preemption
from hovle_jax.report import chain
from hovle_jax.training.losses.tokens import cross_entropy
from hovle_jax.training.stages import STAGES
from tests import micro

LINEAR = "linear"


class Bigrams(nn.Module):
    """Logits of the next token from the last one alone; it has the shapes of an LLM's ends."""

    vocab_size: int
    width: int

    @nn.compact
    def __call__(self, tokens, *_):
        vectors = nn.Embed(self.vocab_size, self.width, name="token_embedding")(tokens)
        return nn.Dense(self.vocab_size, use_bias=False, name="head")(vectors)


def linear_losses(models, params, batch):
    """Cross-entropy of the tokens that follow."""
    logits = models["llm"].apply({"params": params["llm"]}, batch["tokens"])
    return {"loss": cross_entropy(logits, batch["targets"], batch["loss_weights"])}


def linear():
    """The rows of the stage and of its model -> (of STAGES, of COMPONENTS)."""
    module = lambda config, execution: Bigrams(config.llm.vocab_size, config.llm.stack.width)
    stage = dataclasses.replace(STAGES["pretrain"], losses=linear_losses, flops=lambda config, rows: [])
    return {LINEAR: stage}, {"llm": dataclasses.replace(COMPONENTS["llm"], module=module)}


def know_linear():
    """Makes the stage known to this process."""
    for table, rows in zip((STAGES, COMPONENTS), linear()):
        table.update(rows)
    summary.plot_metrics = chain.plot_stages = lambda curves, path, *_: path.write_bytes(b"no plot") and path
    sys.modules["torch"] = None  # tensorboardX imports it where it is there


def config_of(stage: str, **changes) -> RunConfig:
    """Rows, held-out metrics and checkpoints at steps that seldom meet; but for the changes."""
    often = dict(steps=8, log_every=2, checkpoint_every=3, eval_every=4, keep_checkpoints=2) | changes
    if stage == LINEAR:
        return dataclasses.replace(micro.run_config("pretrain", data={"sequence_length": 96}, **often), stage=LINEAR)
    return micro.run_config(stage, **often)


def main(stage: str, workdir: pathlib.Path) -> int:
    jax.config.update("jax_disable_most_optimizations", True)
    if stage == LINEAR:
        know_linear()
    loading.load_corpus = lambda config, split, say=print: micro.corpus()
    train.chain = lambda config, config_folder, workdir, seed: [(config, workdir / config.stage, {})]
    summary.score_run = lambda config, folder, benchmark: None
    with preemption.listening():
        distributed.start()
        with preemption.agreeing(), distributed.ending_together(workdir / stage):
            return train.train(config_of(stage), workdir, workdir, time.time())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], pathlib.Path(sys.argv[2])))
