"""A peer of a benchmark in a Python of its own: what it runs is timed there, so that neither side loads the other's."""

import json
import pathlib
import subprocess

LOOP = """
import json, sys, time
{setup}
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    found = run(*json.loads(line))
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, found]), flush=True)
"""


class Peer:
    """Calls `run(*arguments)`, which `setup` defines, in another process."""

    def __init__(self, python: str, setup: str):
        code = LOOP.format(setup=setup)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([python, "-W", "ignore", "-c", code], **pipes)
        self.missing = "" if self.process.stdout.readline() else self.process.stderr.read().strip().splitlines()[-1]

    def __call__(self, *arguments):
        """-> (seconds, what `run` returned)."""
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(self.process.stderr.read())
        return json.loads(answer)

    def close(self):
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def found(python, setup, name):
    """The peer, or None with a line that says why there is none."""
    if not python or not pathlib.Path(python).is_file():
        print(f"{name}: skipped, as --peer names no Python that has it")
        return None
    peer = Peer(python, setup)
    if peer.missing:
        print(f"{name}: skipped, as {python} says {peer.missing}")
        return None
    return peer
