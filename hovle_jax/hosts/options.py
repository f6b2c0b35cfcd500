"""Flags of the commands that several hosts run; a module that defines flags imports nothing that takes time."""

import os
from typing import Any

from absl import flags

COORDINATOR = flags.DEFINE_string(
    "coordinator", os.environ.get("HOVLE_COORDINATOR", ""), "HOST:PORT of host 0, where jax does not find the hosts"
)
HOSTS = flags.DEFINE_integer(
    "hosts", os.environ.get("HOVLE_HOSTS", 0), "How many hosts there are; 1 = this one alone, whatever jax finds"
)
HOST = flags.DEFINE_integer("host", os.environ.get("HOVLE_HOST", -1), "The index of this host, from 0")
HOST_TIMEOUT = flags.DEFINE_float("host_timeout", 300, "Seconds in which all hosts must have started")


def start(announcement: dict[str, Any]) -> None:
    """`distributed.start` by these flags."""
    from hovle_jax.hosts import distributed

    distributed.start(COORDINATOR.value, HOSTS.value, HOST.value, HOST_TIMEOUT.value, announcement)
