"""How public collections of benchmarks score answers: `scored(...)`, over the table of `table.py`."""

from hovle_jax.evaluation.rules.case import Case, Rule, Verdict
from hovle_jax.evaluation.rules.scoring import Score, scored
from hovle_jax.evaluation.rules.table import BENCHMARKS, RULE_SETS, find

__all__ = ["BENCHMARKS", "RULE_SETS", "Case", "Rule", "Score", "Verdict", "find", "scored"]
