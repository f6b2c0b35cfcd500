"""The cloud's notice that a machine is about to be taken away for maintenance, or because it is preemptible.

A Compute Engine VM, and so a TPU VM and a node of GKE, reads it from its metadata server
(cloud.google.com/compute/docs/metadata/getting-live-migration-notice). Elsewhere nothing is asked.
"""

import contextlib
import os
import pathlib
import threading
import urllib.request
from collections.abc import Callable, Iterator

INSTANCE = "http://metadata.google.internal/computeMetadata/v1/instance/"
# By the name under INSTANCE: what means that the machine goes. A VM that migrates runs on.
NOTICES = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}
PRODUCT = pathlib.Path("/sys/class/dmi/id/product_name")
EVERY_SECONDS = 5.0
ANSWER_SECONDS = 3.0


def on_google_cloud() -> bool:
    """Whether this machine is one of Compute Engine; asks no network. HOVLE_MAINTENANCE=0 says no."""
    if os.environ.get("HOVLE_MAINTENANCE") == "0":
        return False
    try:
        return PRODUCT.read_text().startswith("Google")
    except OSError:
        return False


def read_notice() -> str:
    """What the metadata server says of this machine's end, as 'preempted'; '' = nothing, or no answer."""
    for name, goes in NOTICES.items():
        asking = urllib.request.Request(INSTANCE + name, headers={"Metadata-Flavor": "Google"})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with contextlib.suppress(OSError), direct.open(asking, timeout=ANSWER_SECONDS) as answer:
            if answer.read(100).decode("utf-8", "replace").strip() == goes:
                return goes if name == "maintenance-event" else name
    return ""


@contextlib.contextmanager
def noticed(tell: Callable[[str], None], read: Callable[[], str] | None = None) -> Iterator[None]:
    """Within the block `tell(text)` is called in a thread, once, when a notice comes.

    One that is there from the beginning is left out: a run that was started again for it would end again, and again.

    Args:
      read: gives the notice, '' = none; None = the metadata server's, where there is one.
    """
    if read is None and not on_google_cloud():
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(read or read_notice, tell, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()


def _watch(read, tell, ended):
    before = read()
    while not ended.wait(EVERY_SECONDS):
        notice = read()
        if notice and notice != before:
            tell(notice)
            return
        before = notice
