"""How sure a share of right answers is, and what one would get without looking at the image."""

import collections
import dataclasses
import math
from collections.abc import Sequence

Z95 = 1.959964  # of the standard normal distribution, two-sided


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """Answers that are right or wrong.

    Attributes:
      right, count: how many answers are the expected ones, of how many.
      commonest: the commonest expected answer; always to give it is the baseline.
      commonest_count: how often it is expected.
    """

    right: int
    count: int
    commonest: str
    commonest_count: int

    @classmethod
    def of(cls, answers: Sequence[str], expected: Sequence[str]) -> "ExactMatch":
        """Compares answers with the expected ones, at least one."""
        right = sum(answer == other for answer, other in zip(answers, expected, strict=True))
        commonest, times = max(collections.Counter(expected).items(), key=lambda pair: (pair[1], pair[0]))
        return cls(right, len(expected), commonest, times)

    @property
    def percent(self) -> float:
        return 100 * self.right / self.count

    @property
    def standard_error(self) -> float:
        """Of the percentage, in percentage points: sqrt(p (1 - p) / n)."""
        share = self.right / self.count
        return 100 * math.sqrt(share * (1 - share) / self.count)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% confidence interval in percent, Wilson's, which holds near 0% and 100% too.

        Wilson, "Probable inference, the law of succession, and statistical inference", 1927. It takes the answers as
        independent; questions about one image are not quite, so the truth is a little wider.
        """
        low, high = wilson_interval(self.right, self.count)
        return 100 * low, 100 * high

    @property
    def baseline(self) -> float:
        """Percent right of always giving the commonest answer."""
        return 100 * self.commonest_count / self.count

    def text(self) -> tuple[str, str]:
        """('98.36%', '95% CI 98.1 to 98.6; ...') for a report."""
        low, high = self.interval
        return f"{self.percent:.2f}%", (
            f"95% CI {low:.1f} to {high:.1f}%; {self.right:,} of {self.count:,}; "
            f'always "{self.commonest}" would give {self.baseline:.1f}%'
        )


def wilson_interval(right: int, count: int, z: float = Z95) -> tuple[float, float]:
    """The interval of a share of successes, as fractions; z: how many standard deviations it reaches."""
    share = right / count
    scale = 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)
