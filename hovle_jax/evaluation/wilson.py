"""Wilson's interval of a share."""

import math

Z95 = 1.959964  # of the standard normal distribution, two-sided


def wilson_interval(right: float, count: float, z: float = Z95) -> tuple[float, float]:
    """The interval of a share of successes, as fractions; z: how many standard deviations it reaches."""
    share = right / count
    scale = 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)
