"""Searches a folder of images by a text or an image, with a CLIP or SigLIP.

    python -m hovle_jax.search index --checkpoint runs/contrast --images photos --index photos.index
    python -m hovle_jax.search query --index photos.index --text "a red circle" --picture hits.png
    python -m hovle_jax.search query --index photos.index --image docs/example.png --top 3 --json

`index` encodes all images below a folder; given again, it encodes what is new or changed, and drops what is gone. An
image that cannot be read is named and left out, and the status is 1. `query` finds the nearest of all, or nearly so by
a graph (`index --ann`) where these are many (docs/clip.md).
"""

import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip import options
from hovle_jax.inference.dtype_option import DTYPE
from hovle_jax.system import command_line
from hovle_jax.system.printable import printable

if TYPE_CHECKING:
    from hovle_jax.retrieval.index import Index

USAGE = "python -m hovle_jax.search index|query --index INDEX [options]"
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "The folder of a finished run or an import: runs/contrast; a public checkpoint or hf:ORG/NAME. "
    "Of query: where the index's model lies now, if it was moved",
)  # fmt: skip
IMAGES = flags.DEFINE_string("images", None, "Of index: the folder of images")
INDEX = flags.DEFINE_string("index", None, "The folder of the index")
ANN = flags.DEFINE_bool("ann", False, "Of index: make a graph too, for a million images and more; queries then use it")
EXACT = flags.DEFINE_bool("exact", False, "Of query: look at all images of an index that has a graph")
TEXT = flags.DEFINE_string("text", "", "Of query: what the images should show")
IMAGE = flags.DEFINE_string("image", "", "Of query: an image that they should resemble")
TOP = flags.DEFINE_integer("top", 12, "Of query: how many images are found", lower_bound=1)
PICTURE = flags.DEFINE_string("picture", "", "Of query: a contact sheet of the hits to draw; .png, .pdf or .svg")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object and nothing else")
for holder in (options.BATCH_SIZE, DTYPE):
    flags.declare_key_flag(holder.name)  # so that --help lists them
ENDINGS = (".png", ".pdf", ".svg")


def say(line: str) -> None:
    """Progress is no result, so it goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def index() -> None:
    """Makes an index, or brings it up to date."""
    folder, images, place = map(command_line.local_folder, ("checkpoint", "images", "index"))
    if not pathlib.Path(images).is_dir():
        raise UserError(f"--images={images}: there is no such folder")
    from hovle_jax.conversion import downloads
    from hovle_jax.inference.encoder import Encoder
    from hovle_jax.retrieval import approximate
    from hovle_jax.retrieval.index import update

    if ANN.value:
        approximate.check_installed()
    folder = str(downloads.found(folder))
    encoder = Encoder.load(folder, options.BATCH_SIZE.value, DTYPE.value)
    made = update(encoder, folder, images, place, say, ANN.value)
    for path, reason in made.bad:
        say(f"{printable(path)} cannot be read: {reason}")
    found = {"index": place, "images": made.images, "encoded": made.encoded, "kept": made.kept, "gone": made.gone}
    found["unreadable"] = len(made.bad)
    print(json.dumps(found) if JSON.value else "\n".join(f"{name:12} {value}" for name, value in found.items()))
    if made.bad:
        sys.exit(1)


def query() -> None:
    """Prints and draws the nearest images."""
    place = command_line.local_folder("index")
    check_query()
    from hovle_jax.data.images import load_image
    from hovle_jax.inference.encoder import Encoder
    from hovle_jax.retrieval import approximate
    from hovle_jax.retrieval.index import Index

    image = load_image(IMAGE.value) if IMAGE.value else None
    found = Index.load(place)
    folder = CHECKPOINT.value or found.about["checkpoint"]
    if not pathlib.Path(folder).is_dir():
        raise UserError(f"the model of the index, {folder}, is not there: give its folder with --checkpoint")
    dtype = found.about["dtype"]
    found.check_model(place, folder, dtype)
    encoder = Encoder.load(folder, 8, dtype)
    vector = encoder.texts([TEXT.value]) if image is None else encoder.images([image])
    exact = EXACT.value
    if found.graph and not exact and (exact := not approximate.is_installed()):
        say("the index has a graph, for which the package usearch is not there: all images are looked at")
    scores, ids = found.nearest(vector, TOP.value, exact)
    hits = [(found.entries[i].path, float(score)) for i, score in zip(ids[0].tolist(), scores[0])]
    show(found, hits)


def check_query() -> None:
    """Raises UserError unless there is one question, and a picture that can be drawn."""
    if bool(TEXT.value) == bool(IMAGE.value):
        raise UserError('give --text, as --text "a red circle", or --image, and not both')
    path = pathlib.Path(PICTURE.value)
    if PICTURE.value and path.suffix.lower() not in ENDINGS:
        raise UserError(f"--picture={path}: its name must end with {', '.join(ENDINGS)}")
    if PICTURE.value and not path.absolute().parent.is_dir():
        raise UserError(f"--picture={path}: there is no folder {path.absolute().parent}")


def show(found: "Index", hits: list[tuple[str, float]]) -> None:
    """Prints the hits, and draws --picture."""
    folder = pathlib.Path(found.about["folder"])
    if JSON.value:
        rows = [{"image": str(folder / path), "score": round(score, 6)} for path, score in hits]
        print(json.dumps({"index": INDEX.value, "text": TEXT.value, "image": IMAGE.value, "hits": rows}))
    else:
        for path, score in hits:
            print(f"{score:7.4f}  {printable(str(folder / path))}")
    if PICTURE.value:
        from hovle_jax.report.hits import plot_hits

        drawn = [(thumbnail(folder / path), path, score) for path, score in hits]
        plot_hits(drawn, PICTURE.value, TEXT.value or f"like {pathlib.Path(IMAGE.value).name}")


def thumbnail(path: pathlib.Path) -> Any:
    """A small copy of an image; None where it is gone."""
    from hovle_jax.data.bad_samples import BadSample
    from hovle_jax.data.files import storage
    from hovle_jax.data.images import decode_image

    try:
        image = decode_image(storage.read(path))
    except BadSample:
        return None
    image.thumbnail((320, 320))
    return image


ACTIONS = {"index": (index, 0), "query": (query, 0)}


def main(arguments: list[str]) -> None:
    """Calls the action."""
    command_line.dispatch(ACTIONS, arguments, USAGE)


if __name__ == "__main__":
    command_line.run(main, USAGE)
