"""The local copies that several hosts have of a work folder at a URL (`system.mirror`): who sends, who takes, when.

Without a URL, hosts see the same folder, and each of these is a barrier alone.
"""

from collections.abc import Callable
from typing import TypeVar

from hovle_jax.errors import UserError
from hovle_jax.hosts import distributed
from hovle_jax.system.mirror import Mirror

T = TypeVar("T")


def open_copy(url: str) -> Mirror:
    """This host's local copy of a work folder, with what lies at the URL.

    Raises:
      UserError: the URL cannot be used; on several hosts SharedError, which names those that cannot.
    """
    if not distributed.several():
        opened = Mirror(url)
        opened.pull()
        return opened
    leads = distributed.is_leader()
    opened = _on_all("a work folder at a URL", lambda: Mirror(url, shared=True, leads=leads))
    remote = opened.remote
    distributed.check_seen(url, lambda name: remote.write(name, b"x"), remote.has, lambda name: remote.remove([name]))
    _on_all("the first host's copy", opened.pull if leads else lambda: None)  # it removes what is half-written there
    _on_all("the other hosts' copies", opened.pull if not leads else lambda: None)
    return opened


def from_leader(name: str, mirror: Mirror | None) -> None:
    """The URL and all hosts have what host 0 has written so far; a barrier of this name."""
    if mirror and distributed.is_leader():
        mirror.push()
    distributed.wait(name)
    if mirror and not distributed.is_leader():
        mirror.take_new()
    if mirror:  # nothing is removed there while it is taken
        distributed.wait(f"{name} on all hosts")


def to_leader(name: str, mirror: Mirror | None) -> None:
    """Host 0 has what all hosts have written so far; a barrier of this name."""
    if mirror and mirror.shared and not distributed.is_leader():
        mirror.push()
    distributed.wait(name)
    if mirror and mirror.shared and distributed.is_leader():
        mirror.take_new()


def _on_all(what: str, do: Callable[[], T]) -> T:
    """What `do` gives, once it has succeeded on all hosts."""
    made, reason = [], None
    try:
        made.append(do())
    except UserError as error:
        reason = str(error)
    reasons = distributed.gather(what, reason)
    failed = [host for host, reason in enumerate(reasons) if reason]
    if failed:
        raise distributed.SharedError(f"host {failed[0]} of {len(reasons)}: {reasons[failed[0]]}")
    return made[0]
