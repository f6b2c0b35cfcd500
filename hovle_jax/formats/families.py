"""Which family a public checkpoint is of, and how its tensors become our parameters."""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.formats import gguf, hovle, internvl, llms
from hovle_jax.formats.fields import read_object
from hovle_jax.formats.mapping import check, deferred, load, nested
from hovle_jax.formats.sizes import check_sizes
from hovle_jax.formats.source import SafetensorsFolder
from hovle_jax.model.config import LLMConfig, TeacherConfig
from hovle_jax.system.cache import cache_dir


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A public checkpoint: what it is, where its tensors are, what they become.

    Attributes:
      kind: 'llm' (LLMConfig), 'teacher' (ViTConfig), 'internvl' (InternVLConfig) or 'hovle' (HoVLEConfig).
      config: ours, read from the checkpoint's own.
      public_config: config.json or GGUF's metadata.
      rules: public names <-> our paths.
      source: `shapes` {name: shape}, `read(name)` and `file_of(name)`.
    """

    kind: str
    config: Any
    public_config: dict
    rules: list
    source: Any

    def load(self, abstract=None):
        """Parameters, tensor by tensor; `abstract` (shapes with shardings) says where they go, else host memory."""
        return load(self.rules, self.source, abstract)

    def components(self):
        """{our component: its config}."""
        if self.kind == "llm":
            return {"llm": self.config}
        if self.kind == "teacher":
            return {"teacher": TeacherConfig("internvit", self.config, projector="linear")}
        if self.kind == "internvl":
            return {"teacher": self.config.teacher, "llm": self.config.llm}
        return {"embedding": self.config.embedding, "llm": self.config.llm}

    def component_rules(self):
        """The rules with our components' names in front."""
        return nested(self.rules, ours="llm") if self.kind == "llm" else self.rules

    def check(self, abstract):
        """Names and shapes of all tensors against our parameters' {component: shapes}; raises UserError."""
        check(self.component_rules(), self.source, abstract)

    def load_component(self, component, abstract=None):
        """The parameters of one component alone; the others' tensors are not read."""
        return load(*self._part(component), None if abstract is None else {component: abstract})[component]

    def deferred_component(self, component):
        """The same, with nothing read yet: {path: (shape, function that reads it)}."""
        leaves = deferred(*self._part(component))
        return {path.removeprefix(f"{component}/"): leaf for path, leaf in leaves.items()}

    def _part(self, component):
        """-> (rules, source) of one component."""
        rules = [r for r in self.component_rules() if r.ours[0].split("/")[0] == component]
        names = {name for r in rules for name in r.names()}
        shapes = {name: shape for name, shape in self.source.shapes.items() if name in names}
        return rules, Part(shapes, self.source.read, self.source.file_of)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some tensors of a source."""

    shapes: dict
    read: Callable
    file_of: Callable


@dataclasses.dataclass(frozen=True)
class Family:
    kind: str
    config_from_json: Callable
    rules: Callable


FAMILIES = {
    **dict.fromkeys(llms.MODULES, Family("llm", llms.config_from_json, llms.rules)),
    "intern_vit_6b": Family("teacher", internvl.vision_from_json, internvl.tower_rules),
    "internvl": Family("internvl", internvl.config_from_json, internvl.rules),
    "hovle": Family("hovle", hovle.config_from_json, hovle.rules),
}


def family_of(config, where="config.json"):
    """The key in FAMILIES. Raises UserError for an architecture that is not known."""
    kind = config.get("model_type")
    if kind == "internvl_chat":
        kind = "hovle" if config.get("embedding_config") is not None else "internvl"
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(sorted((FAMILIES.keys() - {"internvl", "hovle"}) | {"internvl_chat"}))
        raise UserError(f"{where}: model_type={config.get('model_type')!r} is not supported; supported: {known}")
    return kind


HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "*.py", "merges.txt")


def local(source):
    """The path of a checkpoint: itself, or that of a hub id's ('OpenGVLab/HoVLE') files, fetched into the cache folder.

    Raises:
      UserError: there is neither a path nor a hub id of this name, or the hub cannot be reached.
    """
    path = pathlib.Path(source)
    if path.exists() or not re.fullmatch(r"[\w-]+/[\w.-]+", str(source)):
        return path
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise UserError(
            f"{source} is not a path here; to fetch it from the hub: pip install huggingface_hub, or download the "
            "repository's files into a folder and give that"
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(
            str(source), allow_patterns=list(HUB_FILES), cache_dir=cache_dir("hub")
        )
    except Exception as error:  # its own errors, and those of the HTTP library that it uses
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source} is not a path here and cannot be fetched from the hub ({reason})") from None
    return pathlib.Path(folder)


def open_checkpoint(path):
    """A Checkpoint from a folder in Hugging Face layout, or a .gguf file.

    Raises:
      UserError: what it is, or a part of it, is missing, broken or not supported.
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return _open_gguf(path)
    config_path = path / "config.json"
    if not config_path.is_file():
        raise UserError(
            f"{config_path} does not exist; a public checkpoint is a folder with config.json and .safetensors files, "
            "or one .gguf file"
        )
    public_config = read_object(config_path)
    family = FAMILIES[family_of(public_config, str(config_path))]
    source = SafetensorsFolder(path)
    read = lambda: family.config_from_json(_with_bias(public_config, source.shapes), str(config_path))
    config = _config(read, config_path, source.shapes)
    config = _with_stored_head(config, source)
    return Checkpoint(family.kind, config, public_config, family.rules(config), source)


def _config(read, where, shapes):
    """What `read` makes of a public config, with sizes that its tensors can have; all that is wrong is a UserError."""
    try:
        config = read()
        check_sizes(config, shapes, str(where))
    except UserError as error:
        raise error if str(where) in str(error) else UserError(f"{where}: {error}") from None
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:  # a value that none has
        raise UserError(f"{where} cannot be read: {error!r}") from None
    return config


def _with_stored_head(config, source):
    """A tied head that is in the file all the same: a copy is written again, and one that differs is a head of its own.

    That is how transformers reads them.
    """
    llm = config if isinstance(config, LLMConfig) else getattr(config, "llm", None)
    if llm is None or not llm.tied:
        return config
    heads = [n for n in source.shapes if n.removeprefix("language_model.") in ("lm_head.weight", "output.weight")]
    if not heads:
        return config
    table = heads[0].removesuffix("lm_head.weight").removesuffix("output.weight") + llms.TABLES[llm.family]
    if table not in source.shapes:
        return config
    is_copy = np.array_equal(source.read(heads[0]), source.read(table), equal_nan=True)
    llm = dataclasses.replace(llm, head_stored=True) if is_copy else dataclasses.replace(llm, tied=False)
    return llm if isinstance(config, LLMConfig) else dataclasses.replace(config, llm=llm)


def _with_bias(public_config, names):
    """InternLM2's `bias`, where config.json leaves it to the public code's default, is what the tensors say."""
    key = "llm_config" if "llm_config" in public_config else None
    llm = public_config[key] if key else public_config
    if not isinstance(llm, dict) or llms.named(llm)["model_type"] != "internlm2" or "bias" in llm:
        return public_config
    llm = llm | {"bias": any(name.endswith(".attention.wqkv.bias") for name in names)}
    return public_config | {key: llm} if key else llm


def _open_gguf(path):
    source = gguf.GGUFFile(path)
    read = lambda: gguf.config_from_metadata(source.metadata, source.shapes, source.rope_factors, str(path))
    config = _config(read, path, source.shapes)
    rules = gguf.rules(config)
    return Checkpoint("llm", config, source.metadata, rules, source)
