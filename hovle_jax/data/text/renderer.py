"""The process that renders chat templates: a line of JSON in, one out, until its input ends. `rendering` starts it.

Run by its path, so that it imports Jinja alone. A template runs in Jinja's immutable sandbox, which keeps it from
Python's objects; the process keeps it from the machine's time and memory. What exceeds the CPU time ends the process.
"""

import contextlib
import datetime
import functools
import json
import signal
import sys
from typing import Any


class Refused(Exception):
    """Raised by a template's own `raise_exception`."""


class TooLong(Exception):
    """More text than `limit`."""


def _refuse(message):
    raise Refused(message)


@functools.cache
def _environment():
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks answers; its content is rendered as usual."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment


@functools.lru_cache(maxsize=4)
def _compiled(source):
    return _environment().from_string(source)


def _written(template, variables, limit):
    """The text of a template, ended as soon as it is too long."""
    pieces, size = [], 0
    for piece in template.generate(**variables):
        size += len(piece)
        if size > limit:
            raise TooLong
        pieces.append(piece)
    return "".join(pieces)


def answer(job: dict[str, Any]) -> dict[str, str]:
    """{"template", "variables" or None, "limit"} -> {"text"}, or {"refused"} or {"error"} with the reason."""
    try:
        template = _compiled(job["template"])
        text = "" if job["variables"] is None else _written(template, job["variables"], job["limit"])
        return {"text": text}
    except Refused as error:
        return {"refused": str(error)[:1000]}
    except TooLong:
        return {"error": f"it writes more than {job['limit']:,} characters"}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # noqa: BLE001 (a template's code can fail in any way)
        return {"error": (str(error) or type(error).__name__)[:1000]}


def _limit_memory(extra):
    """So many bytes more than now, where the system can say and limit them."""
    with contextlib.suppress(OSError, ValueError, ImportError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + extra
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(seconds: float, memory: int) -> None:
    """Answers one line after another, each within so many seconds of CPU time, SIGPROF's default being the end."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a profiler in the parent leaves it ignored, for its children too
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    _environment()
    _limit_memory(memory)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            said = json.dumps(answer(json.loads(line)))
        except MemoryError:  # of the answer
            said = '{"error": "it needs too much memory"}'
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(said.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
