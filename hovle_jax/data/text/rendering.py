"""Renders chat templates in a process of their own, whose time and memory are limited.

A checkpoint's template is a program of strangers. The sandbox keeps it from files and Python's objects, yet one
expression (`'a' * 10**10`) takes all memory, and one C call cannot be interrupted from another thread. So `renderer`
renders in a child, which is killed where it takes too long and started again for the next template.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from hovle_jax.errors import UserError

CPU_SECONDS = 1.0  # for one conversation, which takes a thousandth of it
MEMORY = 100 * 2**20  # bytes, beside Python's own
MOST_TEXT = 2**20  # characters, beside those of the messages
WAIT_SECONDS = 60  # for an answer, on a machine with other work; the CPU time is the limit that counts


def render(template: str, variables: dict[str, object] | None) -> str:
    """The text of a Jinja template; with None it is only compiled, and the text is empty.

    Args:
      template: Jinja source.
      variables: JSON values; 'messages' among them.
    Raises:
      UserError: the template is broken, refuses the messages, or exceeds the limits of time, memory or length.
    """
    messages = (variables or {}).get("messages")
    given = sum(map(_length, messages)) if isinstance(messages, Sequence) else 0
    job = {"template": template, "variables": variables, "limit": MOST_TEXT + given}
    answer = _ask(json.dumps(job).encode() + b"\n")
    if "refused" in answer:
        raise UserError(f"the checkpoint's chat template refuses these messages: {answer['refused']}")
    if "error" in answer:
        raise UserError(f"the checkpoint's chat template cannot be rendered ({answer['error']})")
    return answer["text"]


def _length(message):
    return sum(len(text) for text in message.values() if isinstance(text, str))


class _Child:
    """The running process, and the process that it belongs to: a fork must start its own."""

    def __init__(self):
        if importlib.util.find_spec("jinja2") is None:
            raise UserError('chat templates need the package jinja2; run: pip install "hovle_jax[convert]"')
        script = pathlib.Path(__file__).with_name("renderer.py")
        # -P: a jinja2.py in the current folder is not Jinja. A session of its own: Ctrl-C is for its parent.
        line = [sys.executable, "-P", str(script), str(CPU_SECONDS), str(MEMORY)]
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def ask(self, line):
        """Its answer, b'' where it has ended."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line)
            self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], WAIT_SECONDS)[0]:
            self.process.kill()
        return self.process.stdout.readline()

    def end(self):
        """Closes its input, which ends it, and waits."""
        if self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()


_lock = threading.Lock()
_children: list[_Child] = []  # none or one


def _ask(line):
    """The child's answer. One that had ended before it was asked is started again."""
    with _lock:
        if _children and (_children[0].owner != os.getpid() or _children[0].process.poll() is not None):
            end()
        if not _children:
            _children.append(_Child())
        said = _children[0].ask(line)
        if said:
            return json.loads(said)
        process = _children[0].process
        end()
    return {"error": _why(process.wait())}


def _why(status):
    if status == -signal.SIGPROF:
        return f"it takes more than {CPU_SECONDS:g} s"
    return f"its process ended with status {status}"


def end() -> None:
    """Ends the child; the next template starts one."""
    while _children:
        _children.pop().end()


def _forget():
    """In a fork: the lock may be held by a thread that is not there, and the child is another's."""
    global _lock
    _lock = threading.Lock()


atexit.register(end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
