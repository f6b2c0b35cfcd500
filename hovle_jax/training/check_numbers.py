"""Numbers of a run's config that mean nothing, said with the number that would do."""

import math
from typing import Any

from hovle_jax.config import HealthConfig, OptimizerConfig, RunConfig
from hovle_jax.errors import UserError
from hovle_jax.system.command_line import warn

# The least value of a key, and what it counts.
AT_LEAST = {
    "steps": (1, "optimizer steps"),
    "log_every": (1, "steps between two lines"),
    "checkpoint_every": (1, "steps between two checkpoints"),
    "keep_checkpoints": (1, "checkpoints that stay"),
    "keep_every": (0, "a number of steps; 0 keeps none for it"),
    "stop_at_step": (0, "a step; 0 never stops early"),
    "eval_every": (0, "steps between two evaluations; 0 evaluates at both ends"),
    "eval_rows": (0, "held-out rows; 0 takes all"),
    "eval_limit": (0, "questions of the benchmark; 0 takes all"),
    "data.batch_size": (1, "rows of the global batch"),
    "data.sequence_length": (1, "tokens of a row"),
    "data.tiles": (1, "tiles of a row"),
    "data.samples_per_row": (0, "samples of a row; 0 takes as many as fit"),
    "data.random_tokens": (0, "random ids"),
    "optimizer.warmup_steps": (0, "steps"),
    "health.max_skipped": (0, "updates that may be left out"),
}
LARGEST_SEED = 2**32 - 1


def check_numbers(config: RunConfig) -> None:
    """Raises UserError for a count, a seed or a number of the optimizer outside of its range."""
    for key, (least, what) in AT_LEAST.items():
        value = _value(config, key)
        if value is not None and value < least:
            raise UserError(f"{key}={value} must be at least {least} ({what})")
    if not 0 <= config.seed <= LARGEST_SEED:
        raise UserError(f"seed={config.seed} must be from 0 to {LARGEST_SEED}")
    check_optimizer(config.optimizer)
    check_keeping(config)
    check_health(config.health)
    warmup = config.optimizer.warmup_steps
    if warmup and warmup >= config.steps > 1:
        warn(
            f"optimizer.warmup_steps={warmup} is not below steps={config.steps}: the learning rate rises to the end; "
            f"--config.optimizer.warmup_steps={config.steps // 10} leaves the rest for its decay"
        )


def check_keeping(config: RunConfig) -> None:
    """Raises UserError where the best checkpoint is to stay and checkpoints have no held-out metrics."""
    if config.keep_best and (config.eval_every < 1 or config.checkpoint_every % config.eval_every):
        raise UserError(
            f"keep_best={config.keep_best!r} compares held-out metrics of checkpoints: eval_every={config.eval_every} "
            f"must divide checkpoint_every={config.checkpoint_every}"
        )


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Raises UserError for numbers that AdamW and its schedule cannot use."""
    ranges = {
        "learning_rate": (0 <= optimizer.learning_rate < math.inf, "0 or more"),
        "final_fraction": (0 <= optimizer.final_fraction <= 1, "a share of the peak: from 0 to 1"),
        "weight_decay": (0 <= optimizer.weight_decay < math.inf, "0 or more"),
        "b1": (0 <= optimizer.b1 < 1, "from 0 to below 1"),
        "b2": (0 <= optimizer.b2 < 1, "from 0 to below 1"),
        "eps": (0 < optimizer.eps < math.inf, "above 0"),
        "clip_norm": (optimizer.clip_norm > 0, "above 0; --config.optimizer.clip_norm=inf does not clip"),
    }
    _check_ranges("optimizer", optimizer, ranges)


def check_health(health: HealthConfig) -> None:
    """Raises UserError for a choice or a number that says nothing."""
    ranges = {
        "on_bad_step": (health.on_bad_step in ("stop", "skip"), "'stop' or 'skip'"),
        "spike_sigmas": (0 <= health.spike_sigmas < math.inf, "0 or more standard deviations; 0 leaves no update out"),
        "watchdog_seconds": (0 <= health.watchdog_seconds < math.inf, "0 or more; 0 never looks"),
        "on_hang": (health.on_hang in ("wait", "stop"), "'wait' or 'stop'"),
    }
    _check_ranges("health", health, ranges)


def _check_ranges(part: str, config: Any, ranges: dict[str, tuple[bool, str]]) -> None:
    """ranges: {key: (whether it holds, what is wanted)}."""
    for name, (holds, wanted) in ranges.items():
        if not holds:
            raise UserError(f"{part}.{name}={getattr(config, name)} must be {wanted}")


def _value(config: RunConfig, key: str) -> int | None:
    """A key's value; None where this config has no such key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return value
