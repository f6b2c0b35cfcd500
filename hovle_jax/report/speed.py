"""Model FLOPs a second, and what share of the devices' peak that is."""


class Speed:
    """Measures between calls.

    Attributes:
      flops_per_step: model FLOPs of the global batch (`planning.step_flops`).
      peak: FLOPs a second of all devices together; None = not published, so that there is no MFU.
    """

    def __init__(self, flops_per_step, peak):
        self._flops_per_step = flops_per_step
        self._peak = peak
        self._last = None

    def measure(self, step, seconds):
        """The rates since the last call: {'model_flops_per_second'} and, where the peak is known, {'mfu'}.

        Args:
          step: steps done.
          seconds: {activity: seconds} until now (`report.goodput`); steps and the waiting for their data count.
        Returns:
          {name: number, or None where no step was measured yet}.
        """
        now = step, seconds["training"] + seconds["data"]
        (last_step, last_time), self._last = self._last or now, now
        steps, time = now[0] - last_step, now[1] - last_time
        rate = steps * self._flops_per_step / max(time, 1e-9) if steps else None
        rates = {"model_flops_per_second": rate}
        return rates | {"mfu": rate and rate / self._peak} if self._peak else rates
