"""Serves a model by OpenAI's chat completions, and a page to ask from.

    python -m hovle_jax.serve --checkpoint runs/instruct

Then open http://127.0.0.1:8000, or point any client of that protocol at http://127.0.0.1:8000/v1.
"""

import functools
import pathlib
import signal
import sys
import time

from absl import flags

import hovle_jax
from hovle_jax.errors import UserError
from hovle_jax.inference.dtype_option import DTYPE
from hovle_jax.system import command_line

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None,
    "The folder of a finished run or an import, as runs/instruct; smol-llm, which is fetched; or a public checkpoint: "
    "a folder in Hugging Face layout, a .gguf file or hf:ORG/NAME, imported on the way",
)  # fmt: skip
HOST = flags.DEFINE_string("host", "127.0.0.1", "The address to listen on; 0.0.0.0: all of this machine's")
PORT = flags.DEFINE_integer("port", 8000, "The port; 0: a free one", lower_bound=0)
NAME = flags.DEFINE_string("name", "", "The model's name for clients; empty: the folder's")
SLOTS = flags.DEFINE_integer(
    "slots", None, "Requests that are answered at once; default: 8, or as many as there is memory for", lower_bound=1
)
LENGTH = flags.DEFINE_integer("length", None, "The most tokens of a prompt with its answer", lower_bound=2)
ATTENTION = flags.DEFINE_bool(
    "attention", True, "Keep a second copy of the weights, from which the page shows where the model looks"
)
flags.declare_key_flag(DTYPE.name)  # so that --help lists it
CACHE = flags.DEFINE_enum(
    "cache", "", ["", "bfloat16", "int8"],
    "Of what was read and answered; int8: half of bfloat16's memory. Default: as computed; with --dtype=int8 bfloat16",
)  # fmt: skip
MAX_TILES = flags.DEFINE_integer(
    "max_tiles", None, "The most tiles of an image; default: as in training", lower_bound=1
)
IMAGE_HOST = flags.DEFINE_multi_string("image_host", [], "A host that images may be fetched from; default: none")
KEY_FILE = flags.DEFINE_string(
    "api_key_file", "", "A file whose text clients must send as a key; default: HOVLE_API_KEY, or none"
)
KEY = flags.DEFINE_string("api_key", "", "The key itself; other users of this machine can see it: rather a file")
SECONDS = flags.DEFINE_float("seconds", 600.0, "The longest that a request may take", lower_bound=1.0)
QUEUE = flags.DEFINE_integer("queue", 256, "Answers that are made or wait; more are refused", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("most_new_tokens", 2048, "The longest answer, whatever is asked", lower_bound=1)
GRACE = flags.DEFINE_float("grace", 30.0, "Seconds that running answers have to end when the server is stopped")
WARM = flags.DEFINE_integer(
    "warm_up", 1024, "Tokens of the longest request that nothing is compiled for any more; 0: compiles as it serves",
    lower_bound=0,
)  # fmt: skip


def main() -> None:
    """Serves until SIGINT or SIGTERM; running answers end first."""
    folder = command_line.local_folder("checkpoint")
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError:
        raise UserError('serving needs starlette and uvicorn; run: pip install "hovle_jax[serve]"') from None
    from hovle_jax.serving.app import Server
    from hovle_jax.serving.heads import in_time
    from hovle_jax.serving.opening import key_of, listen

    key = key_of(KEY.value, KEY_FILE.value)
    listening = listen(HOST.value, PORT.value)
    worker, name, text_of = _worker(folder)
    server = Server(worker, name, text_of, worker.limits, key)
    config = uvicorn.Config(
        server.app(), http=in_time(worker.limits.head_seconds), log_level="warning",
        timeout_graceful_shutdown=int(GRACE.value),
    )  # fmt: skip
    web = uvicorn.Server(config)
    host = f"[{HOST.value}]" if ":" in HOST.value else HOST.value
    print(f"serving {name} at http://{host}:{listening.getsockname()[1]} (Ctrl-C ends)", file=sys.stderr)
    # When it has ended in good order uvicorn raises the signal again that ended it.
    ours = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    web.run(sockets=[listening])
    for number, handler in ours.items():
        signal.signal(number, handler)
    worker.stop(GRACE.value)


def _worker(folder):
    """-> (the engine's thread, the model's name, the text of a token)."""
    from hovle_jax.inference.texts import token_text
    from hovle_jax.serving.limits import Limits
    from hovle_jax.serving.metrics import Metrics
    from hovle_jax.serving.worker import Worker

    model = hovle_jax.load(
        folder, max_tiles=MAX_TILES.value, slots=SLOTS.value, length=LENGTH.value, dtype=DTYPE.value,
        keep=ATTENTION.value, cache=CACHE.value,
    )  # fmt: skip
    print(model.engine.memory(), file=sys.stderr)
    hosts = tuple(host.lower() for host in IMAGE_HOST.value)
    limits = Limits(seconds=SECONDS.value, hosts=hosts, queue=QUEUE.value, new_tokens=NEW_TOKENS.value)
    worker = Worker(model.engine, limits, Metrics(), functools.partial(_warm_up, model.engine))
    name = NAME.value or pathlib.Path(folder).absolute().name
    return worker, name, functools.partial(token_text, model.loaded.tokenizer)


def _warm_up(engine, is_over):
    """Says how long it took; until then /health does not say ok."""
    from hovle_jax.inference.warming import warm_up

    if WARM.value == 0:
        return
    start = time.monotonic()
    warmed = warm_up(engine, WARM.value, is_over)
    if is_over():
        return
    print(
        f"ready after {time.monotonic() - start:.1f} s: {warmed.programs} programs compiled, for requests of up to "
        f"{warmed.length:,} tokens",
        file=sys.stderr,
    )


if __name__ == "__main__":
    command_line.run(main)
