"""What lies beside the weights of a public checkpoint: carried along unread, and what is not carried is said.

Public code (*.py, which transformers runs with trust_remote_code) and the settings of processors are copied as they are
from a checkpoint to its import and on to an export. An export never names code that is not in it.
"""

import json
import pathlib
import shutil
from collections.abc import Callable

from hovle_jax.conversion.tokenizer_files import TOKENIZER_FILES
from hovle_jax.formats.fields import read_object
from hovle_jax.formats.source import INDEX, PICKLES

CARRIED = (*TOKENIZER_FILES, "*.py", "preprocessor_config.json", "processor_config.json", "vocab.json", "merges.txt")
WEIGHTS = ("*.safetensors", INDEX, "pytorch_model.bin.index.json", *PICKLES)
# Model types that transformers loads by code of the repository alone, and a repository that has it.
CODE = {
    "hovle": "OpenGVLab/HoVLE",
    "internvl_chat": "OpenGVLab/InternVL2-2B",
    "intern_vit_6b": "OpenGVLab/InternViT-300M-448px",
    "internlm2": "internlm/internlm2-chat-1_8b",
}


def copy_companions(source: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Copies the files of `CARRIED`; returns the names of what is neither those, weights, config.json nor hidden."""
    left_out = []
    for path in sorted(source.iterdir()):
        if any(path.match(pattern) for pattern in CARRIED) and path.is_file():
            shutil.copyfile(path, folder / path.name)
        elif path.name != "config.json" and path.name[0] != "." and not any(path.match(p) for p in WEIGHTS):
            left_out.append(path.name + "/" * path.is_dir())
    return left_out


def settle_code(folder: pathlib.Path, say: Callable) -> None:
    """Drops each `auto_map` of an export whose code is not in the folder, and says what to copy to load it."""
    present, absent = {path.stem for path in folder.glob("*.py")}, set()
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if not (folder / name).is_file():
            continue
        config = read_object(folder / name)
        settled = _settled(config, present, absent)
        if settled != config:
            (folder / name).write_text(json.dumps(settled, indent=2, ensure_ascii=False) + "\n")
    config = read_object(folder / "config.json")
    kind = "hovle" if config.get("embedding_config") else config.get("model_type")
    if absent or (kind in CODE and not present):
        code = ", ".join(f"{name}.py" for name in sorted(absent)) or "*.py"
        say(
            f"no public code here ({code}): to load this folder with transformers' trust_remote_code, copy the *.py "
            f"files and the auto_map of config.json from {CODE.get(kind, 'where the model came from')}"
        )


def _settled(config, present, absent):
    """A config without the `auto_map`s, of its parts too, that name a module that is absent; those are noted."""
    if not isinstance(config, dict):
        return config
    config = {key: _settled(value, present, absent) for key, value in config.items()}
    missing = _modules(config.get("auto_map")) - present
    absent |= missing
    return {key: value for key, value in config.items() if not (missing and key == "auto_map")}


def _modules(auto_map):
    """Names of the modules that an `auto_map` wants in the folder itself; 'repository--module.Class' is elsewhere."""
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return {name.rpartition(".")[0] for name in names if isinstance(name, str) and "--" not in name}
