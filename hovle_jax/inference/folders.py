"""What is wrong with a folder that is to answer: said in one line, with the command that puts it right."""

import json
import pathlib
import re

from hovle_jax.errors import UserError


def check_model_folder(folder: str | pathlib.Path) -> None:
    """Raises UserError where `folder` does not hold a finished model: what it is instead, and the remedy.

    Told apart: a name of the hub, a public checkpoint, a run that stopped early, a folder of several runs, nothing.
    """
    path = pathlib.Path(folder)
    if (path / "model" / "config.json").is_file():
        return
    if not path.exists():
        raise UserError(_absent(str(folder)))
    if is_public(path):
        raise UserError(f"{folder} is a public checkpoint, which is imported first: {_import(folder)}")
    stopped = _stopped(path)
    if stopped:
        raise UserError(
            f"{folder} holds no finished model: the run stopped {stopped}; its training command, once more, goes on "
            "from there to the end"
        )
    finished = sorted(child.name for child in path.glob("*") if (child / "model" / "config.json").is_file())
    example = "runs/instruct"
    if finished:
        example = path / ("instruct" if "instruct" in finished else finished[-1])
    raise UserError(f"{folder} holds no finished model: give that of a finished run, as {example}, or of an import")


def is_public(folder: str | pathlib.Path) -> bool:
    """Whether it is a public checkpoint: a folder in Hugging Face layout, or a .gguf file."""
    path = pathlib.Path(folder)
    if (path / "model" / "config.json").is_file():
        return False
    has_config = any((path / name).is_file() for name in ("config.json", "open_clip_config.json"))
    return path.suffix == ".gguf" or has_config and any(path.glob("*.safetensors"))


def is_hub_id(name: str) -> bool:
    """Whether it is meant as a name of the hub: 'hf:OpenGVLab/HoVLE'."""
    return name.startswith("hf:") and not pathlib.Path(name).exists()


def _absent(name):
    """Of a name that is no path here."""
    path = pathlib.Path(name)
    looks_so = re.fullmatch(r"[\w-]+/[\w.-]+", name) and not name.startswith(("runs/", "models/"))
    if is_hub_id(name):
        return f"{name} is a model of the hub, which is imported first: {_import(name)}"
    if looks_so and not path.parent.exists():
        return f"there is no folder {name}; if it is a model of the hub, give hf:{name}"
    return f"there is no folder {name}; give that of a finished run, as runs/instruct, or of an import"


def _import(source):
    name = pathlib.Path(source).absolute().name.removesuffix(".gguf").partition("@")[0]
    return f"python -m hovle_jax.convert import {source} models/{name}, then --checkpoint models/{name}"


def _stopped(path):
    """'at step N of M' of an unfinished run, or ''."""
    try:
        config = json.loads((path / "config.json").read_text())
        steps, _ = config["steps"], config["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    saved = [int(child.name) for child in path.glob("checkpoints/*") if child.name.isdigit()]
    return f"at step {max(saved)} of {steps}" if saved else f"before its first checkpoint (of {steps} steps)"
