"""A run's programs compiled ahead of time for TPUs that are not there, and read.

from hovle_jax.aot import forecast      # of any jitted step: docs/forecast.md
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "forecast":  # JAX is imported when it is needed
        from hovle_jax.aot.forecasting import forecast

        return forecast
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
