"""How sure a mean of scores is, and what one would get without looking at the image."""

import collections
import dataclasses
import math
from collections.abc import Sequence

from hovle_jax.evaluation.scorers import Scorer
from hovle_jax.evaluation.wilson import wilson_interval
from hovle_jax.report.page import plain


@dataclasses.dataclass(frozen=True)
class MeanScore:
    """The mean of answers' scores, each from 0 to 1.

    Attributes:
      total, count: the sum of the scores, of how many answers; of right and wrong ones the sum is how many are right.
      commonest: the commonest reference; always to give it is the baseline.
      commonest_total: the sum of its scores.
    """

    total: float
    count: int
    commonest: str
    commonest_total: float

    @classmethod
    def of(
        cls,
        scores: Sequence[float],
        references: Sequence[Sequence[str]],
        options: Sequence[Sequence[str]],
        scorer: Scorer,
    ) -> "MeanScore":
        """Of at least one answer; the references and options are those of each question."""
        spelled = {plain(reference): reference for several in references for reference in several}
        times = collections.Counter(plain(reference) for several in references for reference in several)
        commonest = spelled[max(times.items(), key=lambda pair: (pair[1], pair[0]))[0]]
        baseline = (scorer(commonest, right, among) for right, among in zip(references, options, strict=True))
        return cls(sum(scores), len(scores), commonest, sum(baseline))

    @property
    def percent(self) -> float:
        return 100 * self.total / self.count

    @property
    def standard_error(self) -> float:
        """Of the percentage, in percentage points: sqrt(p (1 - p) / n), of scores between 0 and 1 an upper bound."""
        share = self.total / self.count
        return 100 * math.sqrt(share * (1 - share) / self.count)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval in percent, Wilson's, which holds near 0% and 100% too.

        Wilson, "Probable inference, the law of succession, and statistical inference", 1927. It takes the answers as
        independent; questions about one image are not quite, so the truth is a little wider. Scores between 0 and 1
        vary less than right and wrong ones of the same mean, so for them it is rather too wide.
        """
        low, high = wilson_interval(self.total, self.count)
        return 100 * low, 100 * high

    @property
    def baseline(self) -> float:
        """Percent that always giving the commonest answer would score."""
        return 100 * self.commonest_total / self.count

    def text(self) -> tuple[str, str]:
        """('98.36%', '95% CI 98.1 to 98.6; ...') for a report."""
        low, high = self.interval
        right = f"{self.total:,.0f}" if self.total == int(self.total) else f"{self.total:,.1f}"
        return f"{self.percent:.2f}%", (
            f"95% CI {low:.1f} to {high:.1f}%; {right} of {self.count:,}; "
            f'always "{self.commonest}" would give {self.baseline:.1f}%'
        )
