"""Digests of the weights that a run starts from, so that nobody swaps them under it."""

import hashlib
import json
import pathlib

from hovle_jax.errors import UserError
from hovle_jax.system import file_lists
from hovle_jax.system.files import read_json, write_json
from hovle_jax.training.weights import Sources

FILE_NAME = "sources.json"


def check_same_sources(folder: pathlib.Path, sources: Sources) -> None:
    """Notes the weights that a run reads from other folders. Called before it makes a step, and at every resume.

    Raises:
      UserError: the run would resume with other weights than it began with; the message names component and folder.
    """
    path, has_steps = folder / FILE_NAME, any((folder / "checkpoints").glob("[0-9]*"))
    noted = {c: {"folder": str(source), "sha256": digest_of(source, c)} for c, source in sorted(sources.items())}
    if has_steps and path.is_file():
        before = read_json(path, remedy="remove that file, and the same command writes it again")
        for component, now in noted.items():
            was = before.get(component, now)
            if was["sha256"] != now["sha256"]:
                raise UserError(
                    f"the {component} weights in {now['folder']} are not those that {folder} began with (then in "
                    f"{was['folder']}): they were trained or imported again; bring them back, or choose another "
                    "--workdir"
                )
    if not (has_steps and path.is_file()):
        write_json(path, noted)


def digest_of(source: pathlib.Path, component: str) -> str:
    """A digest of the contents of a finished model's component, and of its sizes; '' where there is none.

    A teacher may be another component's tower: then of all that the model has.
    """
    model = pathlib.Path(source) / "model"
    below = component if (model / component).is_dir() else ""
    if not model.is_dir():
        return ""
    listed = file_lists.read_list(model)
    files = listed[0] if listed else file_lists.measured(model, below)
    of_component = lambda name: not below or name.startswith(f"{below}/")
    digests = {name: file["sha256"] for name, file in files.items() if of_component(name)}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
