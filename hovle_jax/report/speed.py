"""Tokens and model FLOPs a second, and the share of the devices' peak."""


class Speed:
    """Measures the rates between two calls.

    Attributes:
      flops_per_step: model FLOPs of the global batch (`Stage.step_flops`).
      peak: FLOPs a second of all devices together; None = not published, and there is no MFU.
    """

    def __init__(self, flops_per_step: float, peak: float | None):
        self._flops_per_step = flops_per_step
        self._peak = peak
        self._last: tuple[int, float, int | None] | None = None

    def measure(self, step: int, seconds: dict[str, float], tokens: int | None = None) -> dict[str, float | None]:
        """The rates since the last call: {'model_flops_per_second'} and, where the peak is known, {'mfu'}.

        Args:
          step: steps done.
          seconds: {activity: seconds} until now (`report.goodput`); steps and waiting for their data count.
          tokens: read until now, for {'tokens_per_second'}; None = not counted.

        Returns:
          {name: number, or None where no step was measured yet}.
        """
        now = step, seconds["training"] + seconds["data"], tokens
        (last_step, last_time, last_tokens), self._last = self._last or now, now
        steps, time = step - last_step, max(now[1] - last_time, 1e-9)
        rate = steps * self._flops_per_step / time if steps else None
        rates: dict[str, float | None] = {"model_flops_per_second": rate}
        if self._peak:
            rates["mfu"] = rate and rate / self._peak
        if tokens is not None and last_tokens is not None:
            rates["tokens_per_second"] = (tokens - last_tokens) / time if steps else None
        return rates
