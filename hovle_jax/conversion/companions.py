"""The files beside the weights of a public checkpoint: copied unread; those that are left out are named.

Public code (*.py, which transformers runs with trust_remote_code) and the settings of processors are copied unchanged
from a checkpoint to its import, and from there to an export. An export never names code that it does not contain.
"""

import json
import pathlib
import shutil
from collections.abc import Callable

from hovle_jax.conversion.tokenizer_files import TOKENIZER_FILES
from hovle_jax.formats.fields import read_object
from hovle_jax.formats.source import INDEX, PICKLES

COPIED = (*TOKENIZER_FILES, "*.py", "preprocessor_config.json", "processor_config.json", "vocab.json", "merges.txt")
CONFIGS = ("config.json", "open_clip_config.json")  # written anew
WEIGHTS = ("*.safetensors", INDEX, "pytorch_model.bin.index.json", *PICKLES)
# Model types that transformers loads only with code from a repository, and a repository that has the code.
CODE = {
    "hovle": "OpenGVLab/HoVLE",
    "internvl_chat": "OpenGVLab/InternVL2-2B",
    "intern_vit_6b": "OpenGVLab/InternViT-300M-448px",
    "internlm2": "internlm/internlm2-chat-1_8b",
}


def copy_companions(source: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Copies the files of `COPIED` -> the names of the others, without weights, config.json and hidden files."""
    left_out = []
    for path in sorted(source.iterdir()):
        if any(path.match(pattern) for pattern in COPIED) and path.is_file():
            shutil.copyfile(path, folder / path.name)
        elif path.name not in CONFIGS and path.name[0] != "." and not any(path.match(p) for p in WEIGHTS):
            left_out.append(path.name + "/" * path.is_dir())
    return left_out


def drop_missing_code(folder: pathlib.Path, say: Callable[[str], object]) -> None:
    """Drops every `auto_map` of an export whose code is not in the folder, and says which files to copy to load it."""
    present, absent = {path.stem for path in folder.glob("*.py")}, set()
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if not (folder / name).is_file():
            continue
        config = read_object(folder / name)
        kept = _without_maps(config, present, absent)
        if kept != config:
            (folder / name).write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    config = read_object(folder / "config.json")
    kind = "hovle" if config.get("embedding_config") else str(config.get("model_type"))
    if absent or (kind in CODE and not present):
        code = ", ".join(f"{name}.py" for name in sorted(absent)) or "*.py"
        say(
            f"this folder lacks public code ({code}): to load it with transformers' trust_remote_code, copy the *.py "
            f"files and the auto_map of config.json from {CODE.get(kind, 'where the model came from')}"
        )


def _without_maps(config, present, absent):
    """A config without the `auto_map`s, nested ones too, that name a missing module; adds these to `absent`."""
    if not isinstance(config, dict):
        return config
    config = {key: _without_maps(value, present, absent) for key, value in config.items()}
    missing = _modules(config.get("auto_map")) - present
    absent |= missing
    return {key: value for key, value in config.items() if not (missing and key == "auto_map")}


def _modules(auto_map):
    """Modules that an `auto_map` expects in the folder itself; 'repository--module.Class' is in another one."""
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return {name.rpartition(".")[0] for name in names if isinstance(name, str) and "--" not in name}
