"""Services that receive a run's metrics as it goes, besides the run's own files: `train --track wandb` or `trackio`."""

import importlib
import importlib.util
import os
import pathlib
import secrets
from collections.abc import Callable
from typing import Any, Protocol

from hovle_jax.errors import UserError
from hovle_jax.system.files import read_json, write_json

PROJECT = "hovle_jax"
FILE_NAME = "tracking.json"  # the service's id of the run, with which a resumed run continues there


class Tracker(Protocol):
    """Receives a run's metrics."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Adds the metrics of a step; a second call for the same step adds to them."""

    def finish(self) -> None:
        """Sends what has not been sent."""


class NoTracker:
    """Drops all metrics."""

    def log(self, step: int, values: dict[str, float]) -> None:
        pass

    def finish(self) -> None:
        pass


class WandbTracker:
    """Weights & Biases."""

    def __init__(self, run_id: str, name: str, config: dict[str, Any]):
        import wandb

        self._run = wandb.init(project=PROJECT, id=run_id, name=name, config=config, resume="allow")
        # Its own step count cannot go back, as a run resumed from a checkpoint does.
        self._run.define_metric("train_step")
        self._run.define_metric("*", step_metric="train_step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values | {"train_step": step})

    def finish(self) -> None:
        self._run.finish()


class TrackioTracker:
    """Trackio, which stores metrics on this machine by default."""

    def __init__(self, run_id: str, name: str, config: dict[str, Any]):
        import trackio

        self._trackio = trackio
        # It identifies a run by its name.
        trackio.init(project=PROJECT, name=f"{name} {run_id}", config=config, resume="allow")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._trackio.log(values, step=step)

    def finish(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, Callable[[str, str, dict[str, Any]], Tracker]] = {"wandb": WandbTracker, "trackio": TrackioTracker}


def check_installed(service: str) -> None:
    """Raises UserError where the service ('' = none) is unknown or its package is missing."""
    if service and service not in TRACKERS:
        raise UserError(f"--track={service} is not one of {', '.join(TRACKERS)}")
    if service and importlib.util.find_spec(service) is None:
        raise UserError(
            f"--track={service} needs the package {service}, which is not installed: pip install {service} "
            f"(or the project's extra, [{service}])"
        )


def open_tracker(service: str, folder: str | os.PathLike, config: dict[str, Any]) -> Tracker:
    """Starts the run at the service, or continues it.

    Args:
      service: 'wandb', 'trackio' or '' for none.
      folder: the run's own; the last two parts of its path become the run's name.
      config: the resolved config, a nested dict.

    Raises:
      UserError: see `check_installed`; also where the service refuses.
    """
    if not service:
        return NoTracker()
    check_installed(service)
    folder = pathlib.Path(folder).absolute()
    name = "/".join(folder.parts[-2:])
    try:
        return TRACKERS[service](_run_id(folder), name, config)
    except Exception as error:  # each service's own errors: no login, no network, no space
        raise UserError(f"--track={service}: the service cannot be used: {error}") from error


def _run_id(folder: pathlib.Path) -> str:
    path = folder / FILE_NAME
    if path.is_file():
        return read_json(path, ["id"], "remove it, and the run begins anew at the service")["id"]
    run_id = secrets.token_hex(4)
    write_json(path, {"id": run_id})
    return run_id
