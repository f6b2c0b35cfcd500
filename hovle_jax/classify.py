"""Classifies images with labels of your own, by a CLIP, a SigLIP or a HoVLE that never learned them.

    python -m hovle_jax.classify --checkpoint runs/contrast --labels "red circle,blue square" --images docs/example.png
    python -m hovle_jax.classify --checkpoint hf:openai/clip-vit-base-patch32 --labels cat,dog --images '*.jpg' --top 3
    python -m hovle_jax.classify --checkpoint runs/contrast --labels labels.txt --images photos --picture out.png --json

--labels is a list with commas, or a file with one a line. --images takes files, patterns and folders; more of them may
follow it. Ends with status 1 where an image cannot be read; the others are classified (docs/clip.md).
"""

import json
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from hovle_jax.errors import UserError
from hovle_jax.evaluation.clip import options
from hovle_jax.inference.dtype_option import DTYPE
from hovle_jax.system import command_line
from hovle_jax.system.printable import printable

if TYPE_CHECKING:
    from hovle_jax.evaluation.clip.image_files import Classified

USAGE = "python -m hovle_jax.classify --checkpoint DIR --labels cat,dog --images FILE... [options]"
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "The folder of a finished run or an import: runs/contrast; a public checkpoint or hf:ORG/NAME"
)
LABELS = flags.DEFINE_string("labels", None, "The classes: cat,dog or a file with one a line")
IMAGES = flags.DEFINE_multi_string("images", [], "Image files, a pattern in quotes, or a folder")
TOP = flags.DEFINE_integer("top", 5, "How many classes of each image are shown", lower_bound=1)
PICTURE = flags.DEFINE_string("picture", "", "An image to draw: the images with bars; .png, .pdf or .svg")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object, with the probabilities of all classes")
for holder in (*options.OF_CLASSES, DTYPE):
    flags.declare_key_flag(holder.name)  # so that --help lists them
ENDINGS = (".png", ".pdf", ".svg")
DRAWN = 24  # images of a picture, at most


def check_picture() -> None:
    """Raises UserError where --picture cannot be drawn."""
    path = pathlib.Path(PICTURE.value)
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"--picture={path}: its name must end with {', '.join(ENDINGS)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--picture={path}: there is no folder {path.absolute().parent}")


def show(one: "Classified", names: tuple[str, ...]) -> None:
    """A line for the image, and one for each class."""
    print(printable(one.path))
    for name, probability in one.top(names, TOP.value):
        print(f"  {100 * probability:6.2f}%  {printable(name)}")


def main(more_images: list[str]) -> None:
    """Classifies, prints and draws."""
    folder, labels = command_line.local_folder("checkpoint"), command_line.required("labels")
    patterns = [*command_line.required("images"), *more_images]
    if PICTURE.value:
        check_picture()
    from hovle_jax.conversion import downloads
    from hovle_jax.evaluation.clip.classifiers import KINDS, Asked
    from hovle_jax.evaluation.clip.image_files import classify_files, find_images, find_labels

    names, paths = find_labels(labels), find_images(patterns)
    asked = Asked.of_flags()
    folder = str(downloads.found(folder))
    asked.check(folder)
    classifier = asked.open(folder, names, lambda line: print(line, file=sys.stderr))
    found = []
    for one in classify_files(classifier, paths, DRAWN if PICTURE.value else 0):
        found.append(one)
        if one.problem:
            print(f"{printable(one.path)} cannot be read: {one.problem}", file=sys.stderr)
        elif not JSON.value:
            show(one, names)
    good = [one for one in found if not one.problem]
    if PICTURE.value and good:
        from hovle_jax.report.classification import plot_classified

        drawn = [(one.image, pathlib.Path(one.path).name, one.top(names, TOP.value)) for one in good[:DRAWN]]
        plot_classified(drawn, PICTURE.value)
    if JSON.value:
        print(json.dumps(about(folder, classifier.kind, names, found), ensure_ascii=False))
    else:
        print(f"\nprobabilities: {KINDS[classifier.kind]}")
    if len(good) < len(found):
        print(f"{len(found) - len(good)} of {len(found)} images cannot be read", file=sys.stderr)
        sys.exit(1)


def about(folder: str, kind: str, names: tuple[str, ...], found: "list[Classified]") -> dict:
    """All results as JSON."""
    result = {"checkpoint": folder, "probabilities": kind, "labels": list(names), "images": []}
    for one in found:
        made = {"problem": one.problem} if one.problem else {"probabilities": dict(one.top(names, len(names)))}
        result["images"].append({"image": one.path, **made})
    return result


if __name__ == "__main__":
    command_line.run(main, USAGE)
