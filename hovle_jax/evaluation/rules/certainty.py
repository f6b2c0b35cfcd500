"""How sure a rule set's number is, be it a mean, an F1 score, points of pairs or a circular accuracy."""

import math
from collections.abc import Sequence

from hovle_jax.evaluation.rules.case import Case, Rule, Scored
from hovle_jax.evaluation.rules.reports import grouped, mean
from hovle_jax.evaluation.wilson import wilson_interval

GROUPS = 101  # a prime, so that questions which alternate in some way are spread over all groups


def interval(rule: Rule, scored: Scored) -> tuple[float, float]:
    """The 95% confidence interval of a rule's number, on its scale; at least one case.

    The standard error is the delete-a-group jackknife's (Efron, "The jackknife, the bootstrap and other resampling
    plans", 1982, chapter 3), with what stands or falls together in one group. The ends are Wilson's of a share with
    that error, as surveys have it, so they hold near 0 and the full mark too (Dean and Pagano, "Evaluating confidence
    interval methods for binomial proportions in clustered surveys", 2015). Categories count as fixed, not as drawn.
    """
    full = len(scored) if rule.sums else rule.full
    units = units_of(rule, scored)
    share = min(1.0, max(0.0, rule.number(scored) / full))
    error = _standard_error(rule, units)
    count = share * (1 - share) / error**2 if error and 0 < share < 1 else len(units)
    low, high = wilson_interval(share * count, count)
    return full * min(low, share), full * max(high, share)  # at 0 and 1 the formula is off by a rounding


def units_of(rule: Rule, scored: Scored) -> list[list]:
    """What stands or falls together, in the order of the cases: the rotations of a question, the pair of an image."""

    def key(place):
        case = scored[place][0]
        return unit_key(rule, case, place)

    return [[scored[place] for place in places] for places in grouped(range(len(scored)), key).values()]


def unit_key(rule: Rule, case: Case, place: int) -> object:
    """What the cases of a unit have in common; without an index a case is one of its own.

    Raises UserError for an index that the rule cannot read.
    """
    if rule.unit:
        return rule.unit(case)
    return ("place", place) if case.index == "" else case.index


def _standard_error(rule: Rule, units: Sequence[list]) -> float:
    """Of the number as a share of the full mark; 0 where all groups agree or there is one alone."""
    count = min(GROUPS, len(units))
    if count < 2:
        return 0.0
    left_out = (_joined(unit for i, unit in enumerate(units) if i % count != group) for group in range(count))
    shares = [rule.number(rest) / (len(rest) if rule.sums else rule.full) for rest in left_out]
    middle = mean(shares)
    return math.sqrt((count - 1) / count * sum((share - middle) ** 2 for share in shares))


def _joined(units):
    return [case for unit in units for case in unit]
