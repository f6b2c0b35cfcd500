"""A server under load: right answers beside aborts, image bombs, malformed and slow requests.

    python tests/benchmarks/serve_load.py
    python tests/benchmarks/serve_load.py --checkpoint runs/instruct --requests 400 --clients 8

Starts `hovle_jax.serve` as a process of its own; without --checkpoint on a tiny model of random weights. Asks each good
request alone first: these are the answers that it must give in the crowd, where the most likely tokens are taken. Then
clients send requests of all kinds, drawn at random, one after another. Prints one JSON object; the exit status is 1
where an answer was wrong, a request was not refused as it must be, a slot stayed taken, or the memory grew.

Memory is the server's resident set, sampled twice a second: the mean of the last third of the time over that of the
first third. Times are the clients'.
"""

import argparse
import base64
import contextlib
import dataclasses
import http.client
import io
import json
import os
import pathlib
import queue
import random
import re
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

ROOT = pathlib.Path(__file__).parents[2]
PATH = "/v1/chat/completions"
SHARES = {"whole": 40, "streamed": 25, "aborted": 12, "bomb": 8, "malformed": 9, "slow": 6}  # of the requests
MOST_GROWTH = 1.10  # of the resident set, from the first third of the time to the last
MINUTES_TO_START = 15


# ---------------------------------------------------------------------------------------------------------------------
# The server


class Served:
    """A running server; its lines on stderr are kept in `said`."""

    def __init__(self, checkpoint: str, *flags: str):
        line = [sys.executable, "-m", "hovle_jax.serve", "--checkpoint", checkpoint, "--port=0", *flags]
        self.process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(lines,), daemon=True).start()
        self.port = self._port(lines)

    def _listen(self, lines):
        for line in self.process.stderr or ():
            self.said.append(line.rstrip())
            lines.put(line)
        lines.put("")

    def _port(self, lines):
        while line := lines.get(timeout=60 * MINUTES_TO_START):
            if found := re.search(r"serving .* at http://[\d.]+:(\d+)", line):
                return int(found[1])
        raise RuntimeError("the server ended: " + "\n".join(self.said))

    def wait(self) -> None:
        """Until /health is well."""
        deadline = time.monotonic() + 60 * MINUTES_TO_START
        while self.get("/health")[0] != 200:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server did not get ready: " + "\n".join(self.said))
            time.sleep(0.2)

    def get(self, path: str) -> tuple[int, str]:
        with contextlib.closing(self.connection()) as connection:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def resident(self) -> int:
        """Bytes."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", fields)[1]) * 1024

    def gauge(self, name: str) -> float:
        """A number of /metrics."""
        return float(re.search(rf"^{name} (.*)$", self.get("/metrics")[1], re.M)[1])

    def stop(self) -> int:
        """The exit status after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


def tiny_model(folder: pathlib.Path) -> str:
    """A finished run with random weights."""
    sys.path.insert(0, str(ROOT))
    from hovle_jax.checkpoints import save_model
    from tests import micro

    config = micro.run_config("instruct")
    params = micro.params(config)
    save_model(folder, config.model_config.only(("embedding", "llm")), {c: lambda c=c: params[c] for c in params})
    micro.tokenizer().save(folder)
    return str(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Requests


def url_of(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image(seed: int, width: int, height: int) -> bytes:
    """A PNG of coloured noise."""
    from PIL import Image

    file = io.BytesIO()
    Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height)).save(file, "PNG")
    return file.getvalue()


def bomb(side: int = 30_000) -> bytes:
    """A PNG of a hundred kilobytes that would fill a gigabyte: one bit a pixel, all of them 0."""
    packer, row = zlib.compressobj(9), bytes(1 + side // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def asked(text: str, *images: bytes, **more) -> dict:
    """A request's body: the most likely tokens."""
    parts: list = [{"type": "image_url", "image_url": {"url": url_of(data)}} for data in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return {"messages": messages, "temperature": 0, **more}


def good_requests() -> list[dict]:
    """Texts, images of several shapes, conversations, long and short, with stops."""
    images = [image(seed, *size) for seed, size in enumerate([(32, 32), (64, 32), (40, 90), (128, 128)])]
    made = [asked(f"what is number {i}? " * (1 + 3 * i), max_tokens=4 + 5 * i) for i in range(6)]
    made += [asked("what is in the image?", data, max_tokens=16) for data in images]
    made += [asked("what has changed?", *images[:2], max_tokens=12), asked("go on", max_tokens=24, stop=["e", " a"])]
    turns = [{"role": "assistant", "content": "a red circle"}, {"role": "user", "content": "and where is it?"}]
    first = asked("what is it?", images[0], max_tokens=10)
    return [*made, first | {"messages": first["messages"] + turns}]


MALFORMED = (
    (b"{", 400), (b"[]", 400), (b"", 400), (b"\xff\xfe", 400), (b"[" * 100_000, 400), (b'{"messages": []}', 400),
    (b'{"messages": [{"role": "user", "content": 3}]}', 400),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    (json.dumps(asked("?", b"no image")).encode(), 400), (json.dumps(asked("?", frobnicate=1)).encode(), 400),
    (json.dumps(asked("?", temperature=-1)).encode(), 400), (json.dumps(asked("?", n=99)).encode(), 400),
    (json.dumps(asked("?", model="another")).encode(), 404), (json.dumps(asked("word " * 100_000)).encode(), 400),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Clients


def sent(served: Served, parts: list[bytes], pause: float = 0.0, length: int | None = None):
    """A connection on which a body was sent in parts, with a pause after each; `length`: what its header says."""
    connection = served.connection()
    connection.putrequest("POST", PATH)
    connection.putheader("Content-Length", str(sum(map(len, parts)) if length is None else length))
    connection.endheaders()
    for part in parts:
        connection.send(part)
        time.sleep(pause)
    return connection


def post(served: Served, parts: list[bytes], pause: float = 0.0) -> tuple[int, dict]:
    """-> (status, the reply's JSON)."""
    with contextlib.closing(sent(served, parts, pause)) as connection:
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())


def answer_of(reply: dict) -> tuple | None:
    """-> (text, finish), or None where it is an error."""
    if "choices" not in reply:
        return None
    (choice,) = reply["choices"]
    return choice["message"]["content"], choice["finish_reason"]


def events(reply):
    """The JSON of server-sent events, as they come."""
    for line in reply:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


@dataclasses.dataclass
class Seen:
    """What the clients saw; lists that are only added to.

    Attributes:
      kinds: of each request.
      wrong: answers and statuses that must not be.
      crowded: statuses of requests that were sent away because too many waited.
      first, whole: seconds to a stream's first text, and of a good request.
    """

    kinds: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    crowded: list[int] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    whole: list[float] = dataclasses.field(default_factory=list)

    def check(self, kind: str, status: int, got: object, wanted: object) -> None:
        if status in (429, 503):
            self.crowded.append(status)
        elif got != wanted:
            self.wrong.append(f"{kind}: {status} {got!r} in place of {wanted!r}"[:500])


class Client:
    """Sends requests of all kinds, one after another; `pause`: seconds of a slow one between its parts."""

    def __init__(
        self, served: Served, good: list[tuple[dict, tuple]], bomb: bytes, seen: Seen, seed: int, pause: float
    ):
        self._served, self._good, self._bomb_body, self._seen = served, good, bomb, seen
        self._draw, self._pause = random.Random(seed), pause

    def request(self, kind: str) -> None:
        """One of the kinds of `SHARES`."""
        self._seen.kinds.append(kind)
        try:
            getattr(self, f"_{kind}")()
        except (OSError, http.client.HTTPException) as error:
            self._seen.wrong.append(f"{kind}: {error!r}")

    def _whole(self):
        body, wanted = self._draw.choice(self._good)
        start = time.perf_counter()
        status, reply = post(self._served, [json.dumps(body).encode()])
        self._seen.whole.append(time.perf_counter() - start)
        self._seen.check("whole", status, answer_of(reply), wanted)

    def _streamed(self):
        body, wanted = self._draw.choice(self._good)
        start, first, text, finish = time.perf_counter(), 0.0, "", None
        with contextlib.closing(sent(self._served, [json.dumps(body | {"stream": True}).encode()])) as connection:
            reply = connection.getresponse()
            for event in events(reply):
                (choice,) = event["choices"]
                if piece := choice["delta"].get("content"):
                    first = first or time.perf_counter()
                    text += piece
                finish = choice["finish_reason"] or finish
        self._seen.whole.append(time.perf_counter() - start)
        if first:
            self._seen.first.append(first - start)
        self._seen.check("streamed", reply.status, (text, finish), wanted)

    def _slow(self):
        body, wanted = self._draw.choice(self._good)
        data = json.dumps(body).encode()
        size = -(-len(data) // 8)
        parts = [data[i : i + size] for i in range(0, len(data), size)]
        status, reply = post(self._served, parts, self._pause)
        self._seen.check("slow", status, answer_of(reply), wanted)

    def _aborted(self):
        """Leaves before the body's end, before the answer's beginning, or in the middle of it."""
        body = self._draw.choice(self._good)[0] | {"stream": True, "max_tokens": 60, "stop": None}
        data, when = json.dumps(body).encode(), self._draw.randrange(3)
        parts = [data[: len(data) // 2] if when == 0 else data]
        with contextlib.closing(sent(self._served, parts, length=len(data))) as connection:
            if when < 2:
                time.sleep(self._pause * self._draw.random())
                return
            reply = connection.getresponse()
            for _ in range(self._draw.randrange(1, 8)):
                reply.readline()

    def _bomb(self):
        status, _ = post(self._served, [self._bomb_body])
        self._seen.check("bomb", status, status, 413)

    def _malformed(self):
        body, wanted = self._draw.choice(MALFORMED)
        status, _ = post(self._served, [body])
        self._seen.check("malformed", status, status, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# The load


def lone_answers(served: Served) -> list[tuple[dict, tuple]]:
    """Each good request with the answer that it gets alone. Raises RuntimeError where it gets none."""
    found = []
    for body in good_requests():
        status, reply = post(served, [json.dumps(body).encode()])
        if status != 200:
            raise RuntimeError(f"{status}: {reply}")
        found.append((body, answer_of(reply)))
    return found


@contextlib.contextmanager
def watched(served: Served, every: float = 0.5):
    """Samples the resident set while something is done; gives the list of samples."""
    samples, is_over = [served.resident()], threading.Event()

    def watch():
        while not is_over.wait(every):
            samples.append(served.resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()


def load(served: Served, requests: int, clients: int, seed: int = 0, pause: float = 0.2) -> dict:
    """Puts a ready server under load and says what was seen."""
    good, seen = lone_answers(served), Seen()
    body = json.dumps(asked("what is it?", bomb(), max_tokens=4)).encode()
    # Whoever is free takes the next one; `next` of a list's iterator is atomic.
    kinds = iter(random.Random(seed).choices(list(SHARES), list(SHARES.values()), k=requests))

    def work(index):
        client = Client(served, good, body, seen, 1_000 * seed + index, pause)
        for kind in kinds:
            client.request(kind)

    compiled, start = served.gauge("hovle_compilations_total"), time.perf_counter()
    with watched(served) as resident:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    seconds = time.perf_counter() - start
    third = max(1, len(resident) // 3)
    first, last = (statistics.mean(part) for part in (resident[:third], resident[-third:]))
    return {
        "requests": dict(sorted((kind, seen.kinds.count(kind)) for kind in SHARES)),
        "clients": clients,
        "seconds": round(seconds, 1),
        "wrong": seen.wrong,
        "sent away for the crowd": len(seen.crowded),
        "stuck slots": stuck(served),
        "programs compiled under load": int(served.gauge("hovle_compilations_total") - compiled),
        "MB resident, first third and last": [round(first / 1e6), round(last / 1e6)],
        "growth": round(last / first, 4),
        "seconds to the first text": percentiles(seen.first),
        "seconds of a whole request": percentiles(seen.whole),
    }


def stuck(served: Served, seconds: float = 60.0) -> int:
    """Slots that are still taken when all clients have gone, after a while."""
    deadline = time.monotonic() + seconds
    while True:
        taken = int(served.gauge("hovle_slots") - served.gauge("hovle_free_slots"))
        if time.monotonic() > deadline or not taken and not served.gauge("hovle_running_requests"):
            return taken
        time.sleep(0.2)


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = lambda share: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else 0.0
    return {"p50": at(0.5), "p99": at(0.99), "most": at(1.0)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="", help="default: a tiny model of random weights")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or tiny_model(pathlib.Path(folder) / "tiny")
        served = Served(checkpoint, f"--slots={args.slots}", f"--length={args.length}")
        try:
            served.wait()
            found = load(served, args.requests, args.clients, args.seed)
        finally:
            status = served.stop()
    found |= {"exit status": status, "start": [line for line in served.said if line.startswith("ready after")]}
    print(json.dumps(found, indent=2, ensure_ascii=False))
    return bool(found["wrong"] or found["stuck slots"] or status or found["growth"] > MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
