"""The thread that owns the engine: requests come in by a queue, answers go out by callbacks."""

import queue
import threading
import time
import traceback
from collections.abc import Callable

from hovle_jax.inference.engine import Engine
from hovle_jax.serving.job import Job
from hovle_jax.serving.limits import Limits, Refused
from hovle_jax.serving.metrics import Metrics


class Worker:
    """Runs an engine in a thread of its own.

    A mistake in one request ends that request alone. An error of the engine itself ends all that it was answering, and
    the worker goes on with empty slots.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        metrics: Metrics,
        prepare: Callable[[Callable[[], bool]], None] = lambda is_over: None,
    ):
        """`prepare` is called first in the thread, as `warming.warm_up`, with a function that says whether the worker
        is being stopped; requests that come meanwhile wait."""
        self.engine, self.limits, self.metrics, self._prepare = engine, limits, metrics, prepare
        self._incoming: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: list[Job] = []
        self._open, self._lock, self._stopping, self.is_ready = 0, threading.Lock(), False, False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Queues jobs, all or none. Raises Refused where too many wait, or the server is being stopped."""
        with self._lock:
            if self._stopping:
                raise Refused(503, "the server is being stopped")
            if self._open + len(jobs) > self.limits.queue:
                raise Refused(429, f"{self._open} answers are made or wait already; try again later")
            self._open += len(jobs)
            for job in jobs:
                self._incoming.put(job)

    def cancel(self, job: Job) -> None:
        """The answer is no longer wanted."""
        job.is_cancelled = True

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, seconds: float) -> bool:
        """Takes nothing more and finishes what it has, for so long at most. Returns whether it finished."""
        with self._lock:
            self._stopping = True
        self._incoming.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # -- in the thread

    def _run(self):
        try:
            self._prepare(lambda: self._stopping)
            self.metrics.watch(self.engine, 0)
            self.is_ready = True
            while not (self._stopping and not self._open):
                self._step()
        except Exception:  # noqa: BLE001 (nothing can be answered any more)
            traceback.print_exc()
        finally:
            self._close()

    def _step(self):
        try:
            self._take_in(self.engine)
            self._drop(self.engine)
            self.engine.step()
            self._finish()
        except Exception as error:  # noqa: BLE001 (whatever it is, the server goes on)
            traceback.print_exc()
            self.metrics.errors += 1
            self.engine.reset()
            self._end_all(error)
        self.metrics.watch(self.engine, len(self._jobs))

    def _end_all(self, error):
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            self._end(job, error)

    def _close(self):
        """Nobody waits for an engine that has ended."""
        with self._lock:
            self._stopping = True
        while not self._incoming.empty():
            if job := self._incoming.get():
                self._jobs.append(job)
        self._end_all(Refused(503, "the engine has ended"))

    def _take_in(self, engine):
        """All that came in; waits where there is nothing to do."""
        while True:
            try:
                job = self._incoming.get(block=not self._jobs and not self._stopping)
            except queue.Empty:
                return
            if job is None:
                return
            engine.enqueue(job.stream)
            self._jobs.append(job)

    def _drop(self, engine):
        """Those that nobody waits for, or that took too long."""
        now = time.monotonic()
        for job in self._jobs:
            if now - job.arrived > self.limits.seconds and job.failure is None:
                job.failure = Refused(504, f"no answer within {self.limits.seconds:g} seconds")
            if job.is_cancelled or job.failure:
                engine.cancel(job.stream)

    def _finish(self):
        now = time.monotonic()
        for job in self._jobs:
            if job.stream.tokens and not job.first:
                job.first = now
        for job in [job for job in self._jobs if job.stream.finish]:
            self._jobs.remove(job)
            self._end(job, job.failure or job.stream)

    def _end(self, job, result):
        with self._lock:
            self._open -= 1
        self.metrics.ended(job, result)
        job.on_end(result)
