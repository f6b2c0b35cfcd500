"""Commands in forks of a process that has imported JAX and the project already: most of what starting one costs.

A fork is a process of its own, with its own flags, standard files, devices and exit status; nothing is compiled, and no
device is there, before it is made. What a command imports first is thus not seen here: tests/test_main.py starts some
the usual way.
"""

import atexit
import functools
import gc
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import warnings

PRELOADED = """
jax jax.numpy flax.linen optax orbax.checkpoint grain PIL.Image absl.app ml_collections.config_flags
hovle_jax.checkpoints hovle_jax.conversion.importing hovle_jax.evaluation.benchmarks hovle_jax.evaluation.summary
hovle_jax.inference.load hovle_jax.training.loop sentencepiece
""".split()


def run(module, arguments, cwd, env, said=None, timeout=180) -> subprocess.CompletedProcess:
    """`python -m MODULE ARGUMENTS` with `said` on its standard input.

    Args:
      env: its whole environment.
      timeout: seconds, after which it is killed and TimeoutExpired is raised.
    """
    arguments = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("in", "out", "err")]
        with open(files[0], "w", encoding="utf-8") as file:
            file.write(said or "")
        job = dict(module=module, arguments=arguments, cwd=str(cwd), env=env, files=files, timeout=timeout)
        status = _ask(_server_for(env), job)
        out, err = (open(file, encoding="utf-8").read() for file in files[1:])
    if status is None:
        raise subprocess.TimeoutExpired([module, *arguments], timeout, out, err)
    return subprocess.CompletedProcess([module, *arguments], status, out, err)


class Process:
    """`python -u -m MODULE ARGUMENTS`, started; its output goes to two files. Behaves like subprocess.Popen."""

    def __init__(self, module, arguments, cwd, env, out, err):
        files = [os.devnull, str(out), str(err)]
        job = dict(module=module, arguments=list(map(str, arguments)), cwd=str(cwd), env=env, files=files, timeout=None)
        self.server, self.returncode = _server_for(env), None
        self.pid = _ask(self.server, job)

    def poll(self):
        if self.returncode is None:
            self.returncode = _ask(self.server, {"of": self.pid})
        return self.returncode

    def wait(self, timeout):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.05)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _ask(server, job):
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def _server_for(env):
    # JAX reads its variables when it is imported.
    read = {name: value for name, value in env.items() if name.startswith(("JAX_", "XLA_", "PYTHON"))}
    return _server(json.dumps(read, sort_keys=True))


@functools.cache
def _server(variables):
    line, env = [sys.executable, "-m", "tests.forked"], os.environ | json.loads(variables)
    server = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    atexit.register(_end, server)
    return server


def _end(server):
    server.kill()
    server.wait()


def serve():
    """Answers each job with the status of its fork, or null if it took too long; without a timeout with its id."""
    for module in PRELOADED:
        __import__(module)
    gc.freeze()  # as in tests/conftest.py
    gc.set_threshold(50_000, 20, 20)
    for line in sys.stdin:
        job = json.loads(line)
        if "of" in job:
            print(json.dumps(_status(job["of"], 0)), flush=True)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that threads do not survive a fork: there is nothing yet that needs one
            child = os.fork()
        if not child:
            _become(job)
            return
        if job["timeout"] is None:
            print(child, flush=True)
            continue
        status = _status(child, job["timeout"])
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        print(json.dumps(status), flush=True)


def _become(job):
    """The command, in this process."""
    for number, (path, mode) in enumerate(zip(job["files"], ("r", "w", "w"))):
        with open(path, mode) as file:
            os.dup2(file.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = (open(number, mode) for number, mode in enumerate(("r", "w", "w")))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    logging.root.handlers.clear()  # of what was imported: a command sets up its own
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.argv = [job["module"], *job["arguments"]]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    runpy.run_module(job["module"], run_name="__main__", alter_sys=True)


def _status(child, timeout):
    """How it has ended; None = it has not, within so many seconds."""
    end = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.02)


if __name__ == "__main__":
    serve()
