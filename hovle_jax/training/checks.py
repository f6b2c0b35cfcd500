"""What is wrong with a run, said before it costs time: its config, its mesh, its tokenizer, its hosts' data."""

import hashlib

from hovle_jax.config import ExecutionConfig, RunConfig
from hovle_jax.data.batch import WEIGHTINGS, CorpusSummary
from hovle_jax.data.text.tokenizer import Tokenizer
from hovle_jax.errors import UserError
from hovle_jax.hosts import distributed
from hovle_jax.model.attention import IMPLEMENTATIONS
from hovle_jax.model.transformer import REMAT_POLICIES
from hovle_jax.training.check_numbers import check_numbers
from hovle_jax.training.stages import find


def check(config: RunConfig) -> None:
    """Everything that can be known to be wrong before a device is touched."""
    stage = find(config.stage)
    check_numbers(config)
    config.model.check()
    if config.data.split != "train":
        raise UserError(f"data.split={config.data.split!r}: training reads the 'train' split alone")
    config.easy_vqa.check()
    check_data(config)
    if "teacher" in stage.components:
        config.teacher.check(config.model.llm.stack.width)
    stage.batch.check(config)
    check_execution(config.execution)


def check_data(config: RunConfig) -> None:
    """Raises UserError for values of the data config that mean nothing."""
    data = config.data
    if data.loss_weights not in WEIGHTINGS:
        raise UserError(f"data.loss_weights={data.loss_weights!r} is not one of {', '.join(WEIGHTINGS)}")
    if not 1 <= data.min_tiles <= data.max_tiles:
        raise UserError(
            f"data.min_tiles={data.min_tiles} and data.max_tiles={data.max_tiles}: a grid has from 1 to max_tiles tiles"
        )
    if config.workers < 0:
        raise UserError(f"workers={config.workers} is a number of processes; 0 uses threads")
    if not 0 <= config.bad_ceiling <= 1:
        raise UserError(f"bad_ceiling={config.bad_ceiling} is a share of samples; set it between 0 and 1")


def check_execution(execution: ExecutionConfig) -> None:
    choices = {"dtype": ("auto", "float32", "bfloat16"), "attention": IMPLEMENTATIONS, "remat": tuple(REMAT_POLICIES)}
    for name, allowed in choices.items():
        if getattr(execution, name) not in allowed:
            raise UserError(f"execution.{name}={getattr(execution, name)!r} is not one of {', '.join(allowed)}")
    if not 0 <= execution.zero <= 3:
        raise UserError(f"execution.zero={execution.zero} is a level of ZeRO: set it from 0 to 3")
    if execution.vocab_chunk < 0:
        raise UserError(f"execution.vocab_chunk={execution.vocab_chunk} is a number of columns; 0 takes all at once")


def check_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raises UserError where it has ids that the model does not know."""
    components = find(config.stage).components
    known = config.clip.text.vocab_size if "clip" in components else config.model.llm.vocab_size
    remedy = "take the tokenizer of the same model"
    if "embedding" in components:
        known = config.model.num_tokens
        more = tokenizer.vocab_size - config.model.embedding.vocab_size
        remedy = f"set model.embedding.num_special_tokens={more}, or take the tokenizer of the same model"
    if tokenizer.vocab_size > known:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids and the model knows {known}; {remedy}")


def check_same_data_everywhere(summary: CorpusSummary, tokenizer: Tokenizer) -> None:
    """Raises UserError where a host has planned other rows, or reads text otherwise."""
    pieces = hashlib.sha256(repr(tokenizer.pieces(range(tokenizer.vocab_size))).encode()).hexdigest()[:12]
    seen = f"data {summary.digest or 'in memory'} of {summary.samples:,} samples, tokenizer {pieces}"
    distributed.check_same("what they read", seen, "give all hosts the same files")
