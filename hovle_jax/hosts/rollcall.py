"""The roll-call: before jax.distributed starts, every host announces itself to host 0, which waits for all of them.

Where hosts are missing, jax's own start ends with a stack trace that counts those that came and does not name the
others. The roll-call uses the coordinator's address and port, so it needs no other hole in a firewall, and frees the
port for jax. One line of JSON goes each way: a host's announcement, and the verdict, which is the same for all.

Whoever reaches the port may speak, so nothing that comes is trusted: a line is short and has one deadline, and a call
must have the word of the job (HOVLE_JOB, '' where it is not set). The word keeps jobs apart; it is no secret.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable
from typing import Any

from hovle_jax.config import differences
from hovle_jax.errors import UserError

RETRY_SECONDS = 0.3
LINE_SECONDS = 5  # within them a connected host must send its whole line; it waits for nothing
GRACE_SECONDS = 15  # a host waits so much longer than host 0, which may have started later
MOST_BYTES = 2**20


def roll_call(announcement: dict[str, Any], address: tuple[str, int], hosts: int, host: int, timeout: float) -> None:
    """Returns when all hosts have announced themselves with equal values.

    Args:
      announcement: JSON values: 'name', this host's; all others must be equal on all hosts.
      address: (name, port) of host 0.
      hosts, host: the number of hosts, and the index of this one.
      timeout: seconds.
    Raises:
      UserError: hosts did not come in time, or differ from host 0; every host raises the same error.
    """
    job = os.environ.get("HOVLE_JOB", "")
    call = json.loads(json.dumps({"host": host, "hosts": hosts, "job": job, **announcement}))
    error = _lead(call, address, timeout) if host == 0 else _join(call, address, timeout)
    if error:
        raise UserError(error)


def numbers(indices: Iterable[int]) -> str:
    """{0, 1, 2, 5} -> '0-2, 5'."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def verdict(calls: dict[int, dict[str, Any]], hosts: int, timeout: float) -> str:
    """What is wrong with the announcements {host: values}, as a message for the user; '' where all is well."""
    missing = set(range(hosts)) - calls.keys()
    if missing:
        names = ", ".join(f"{host} ({calls[host]['name']})" for host in sorted(calls)[:4])
        came = numbers(calls) if len(calls) > 4 else names
        return (
            f"host{'s' * (len(missing) > 1)} {numbers(missing)} of {hosts} did not start within {timeout:g} s; came: "
            f"{came}; see the logs of the missing, or wait longer with --host_timeout"
        )
    different = {host: found for host in calls if (found := differences(_shared(calls[0]), _shared(calls[host])))}
    if different:
        first = min(different)
        key, ours, theirs = different[first][0]
        others = f" (and hosts {numbers(different.keys() - {first})})" if len(different) > 1 else ""
        return (
            f"host {first} ({calls[first]['name']}){others} differs from host 0: {key} is {theirs!r} there and "
            f"{ours!r} here; start the same command with the same software on all hosts"
        )
    return ""


def _shared(call):
    return {key: value for key, value in call.items() if key not in ("host", "name")}


def _lead(own, address, timeout):
    """Host 0: collects the calls and answers all hosts that came -> the verdict."""
    deadline = time.monotonic() + timeout
    calls, lines = {0: own}, {}
    with _listen(address) as server:
        try:
            while len(calls) < own["hosts"] and time.monotonic() < deadline:
                _receive(server, deadline, calls, lines)
                for host in [host for host, line in lines.items() if _is_closed(line)]:
                    lines.pop(host).close()
                    del calls[host]
            error = verdict(calls, own["hosts"], timeout)
            for line in lines.values():
                with contextlib.suppress(OSError):
                    line.sendall(json.dumps({"error": error}).encode() + b"\n")
                    line.shutdown(socket.SHUT_WR)
            for line in lines.values():  # let the other end close first: then the port is free for jax at once
                with contextlib.suppress(OSError):
                    line.settimeout(1)
                    line.recv(1)
        finally:
            for line in lines.values():
                line.close()
    return error


def _listen(address):
    try:
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # a kernel without IPv6
                return socket.create_server(("", address[1]), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        return socket.create_server(("", address[1]), backlog=4096)
    except OSError as error:
        raise UserError(
            f"host 0 cannot listen on port {address[1]} ({error.strerror}); give a free one with --coordinator"
        ) from None


def _receive(server, deadline, calls, lines):
    """Receives one host's call. A caller that does not speak this protocol is ignored."""
    server.settimeout(max(0.01, min(1, deadline - time.monotonic())))
    try:
        line, _ = server.accept()
    except TimeoutError:
        return
    try:
        call = _read_json(line, min(deadline, time.monotonic() + LINE_SECONDS))
        error = _refusal(call, calls)
        if error:
            line.sendall(json.dumps({"error": error}).encode() + b"\n")
            raise ValueError(error)
    except (OSError, ValueError):
        line.close()
        return
    calls[call["host"]], lines[call["host"]] = call, line


def _refusal(call, calls):
    """Why a host's call does not count; '' = it does. Raises ValueError where it is no host's."""
    host = call.get("host") if isinstance(call, dict) else None
    if type(host) is not int or not isinstance(call.get("name"), str):  # True is an int too
        raise ValueError("not a call")
    if call.get("job") != calls[0]["job"]:
        return f"{calls[0]['name']} waits for another job: HOVLE_JOB must be the same on all hosts; see --coordinator"
    if not 0 < host < calls[0]["hosts"]:
        raise ValueError("not a host of this job")
    if host in calls:
        return f"two hosts call themselves {host}: {calls[host]['name']} and {call['name']}; see --host"
    return ""


def _join(own, address, timeout):
    """Any other host: calls until host 0 answers -> the verdict."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic())) as line:
                line.sendall(json.dumps(own).encode() + b"\n")
                answer = _read_json(line, time.monotonic() + timeout + GRACE_SECONDS)
                if not isinstance(answer, dict) or not isinstance(answer.get("error"), str):
                    raise ValueError("not a verdict")
                return answer["error"]
        except (OSError, ValueError):  # it does not listen yet, or was restarted
            time.sleep(RETRY_SECONDS)
    name, port = address
    return (
        f"host 0 ({name}:{port}) did not answer host {own['host']} ({own['name']}) within {timeout:g} s; see its log, "
        "and whether its port can be reached"
    )


def _read_json(line, deadline):
    """The value in one line. Raises OSError when the deadline has passed, ValueError for anything but such a line."""
    content = b""
    while not content.endswith(b"\n"):
        line.settimeout(max(0.01, deadline - time.monotonic()))
        more = line.recv(2**16)
        if not more or len(content) > MOST_BYTES or time.monotonic() > deadline:
            raise ValueError("incomplete line")
        content += more
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _is_closed(line):
    """Whether the other end has closed the line; it sends nothing after its call."""
    line.settimeout(0)
    try:
        return not line.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        line.settimeout(LINE_SECONDS)
