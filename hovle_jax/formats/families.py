"""Which family a public checkpoint belongs to, and how its tensors become our parameters."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hovle_jax.components import Params
from hovle_jax.errors import UserError
from hovle_jax.formats import clips, gguf, hf_clip, hovle, internvl, llms, open_clip
from hovle_jax.formats.fields import read_object
from hovle_jax.formats.mapping import Array, DeferredLeaf, Rule, check, deferred, load, nested, to_public
from hovle_jax.formats.sizes import check_sizes
from hovle_jax.formats.source import SafetensorsFolder, TensorSource
from hovle_jax.model.config import LLMConfig
from hovle_jax.model.teacher_config import TeacherConfig
from hovle_jax.system.cache import cache_dir


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A public checkpoint: its kind, its config, its tensors, and what these become.

    Attributes:
      kind: 'llm' (LLMConfig), 'teacher' (ViTConfig), 'internvl' (InternVLConfig), 'hovle' (HoVLEConfig) or 'clip'
        (CLIPConfig).
      config: ours, read from the checkpoint's own.
      public_config: config.json, or a GGUF file's metadata.
      rules: public names <-> our paths.
      source: where its tensors are read from.
    """

    kind: str
    config: Any
    public_config: dict[str, Any]
    rules: list[Rule]
    source: TensorSource

    def load(self, abstract: Params | None = None) -> Params:
        """The parameters, read tensor by tensor onto the shardings of `abstract`; without it into numpy arrays."""
        return load(self.rules, self.source, abstract)

    def to_public(self, params: Params) -> dict[str, Array]:
        """Parameters as `load` gives them, or their gradients -> {public name: array}."""
        return to_public(self.rules, params)

    def components(self) -> dict[str, Any]:
        """{our component: its config}."""
        if self.kind in ("llm", "clip"):
            return {self.kind: self.config}
        if self.kind == "teacher":
            return {"teacher": TeacherConfig("internvit", self.config, projector="linear")}
        if self.kind == "internvl":
            return {"teacher": self.config.teacher, "llm": self.config.llm}
        return {"embedding": self.config.embedding, "llm": self.config.llm}

    def component_rules(self) -> list[Rule]:
        """The rules, with our paths starting at a component's name."""
        return nested(self.rules, ours=self.kind) if self.kind in ("llm", "clip") else self.rules

    def check(self, abstract: Params) -> None:
        """Raises UserError where names or shapes of the tensors do not fit our parameters' {component: shapes}."""
        check(self.component_rules(), self.source, abstract)

    def load_component(self, component: str, abstract: Params | None = None) -> Params:
        """The parameters of one component; the others' tensors are not read."""
        return load(*self._of(component), None if abstract is None else {component: abstract})[component]

    def deferred_component(self, component: str) -> dict[str, DeferredLeaf]:
        """The same, not read yet: {path: (shape, function that reads the leaf)}."""
        leaves = deferred(*self._of(component))
        return {path.removeprefix(f"{component}/"): leaf for path, leaf in leaves.items()}

    def _of(self, component: str) -> tuple[list[Rule], TensorSource]:
        """-> (rules, source) of one component."""
        rules = [r for r in self.component_rules() if r.ours[0].split("/")[0] == component]
        names = {name for r in rules for name in r.names()}
        shapes = {name: shape for name, shape in self.source.shapes.items() if name in names}
        return rules, TensorSubset(shapes, self.source.read, self.source.file_of)


@dataclasses.dataclass(frozen=True)
class TensorSubset:
    """Some tensors of a source; see `TensorSource`."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    file_of: Callable[[str | None], pathlib.Path]


@dataclasses.dataclass(frozen=True)
class Family:
    """How the checkpoints of a `model_type` are read.

    Attributes:
      kind: see `Checkpoint`.
      config_from_json: (config.json, where it is) -> our config.
      rules: our config -> the checkpoint's rules.
    """

    kind: str
    config_from_json: Callable[[dict[str, Any], str], Any]
    rules: Callable[[Any], list[Rule]]


FAMILIES = {
    **dict.fromkeys(llms.MODULES, Family("llm", llms.config_from_json, llms.rules)),
    "intern_vit_6b": Family("teacher", internvl.vision_from_json, internvl.tower_rules),
    "internvl": Family("internvl", internvl.config_from_json, internvl.rules),
    "hovle": Family("hovle", hovle.config_from_json, hovle.rules),
    **dict.fromkeys(hf_clip.FAMILIES, Family("clip", hf_clip.config_from_json, hf_clip.rules)),
}


def family_of(config: dict[str, Any], where: str = "config.json") -> str:
    """The key in `FAMILIES`. Raises UserError for an unknown architecture."""
    kind = config.get("model_type")
    if kind == "internvl_chat":
        kind = "hovle" if config.get("embedding_config") is not None else "internvl"
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(sorted((FAMILIES.keys() - {"internvl", "hovle"}) | {"internvl_chat"}))
        raise UserError(f"{where}: model_type={config.get('model_type')!r} is not supported; supported: {known}")
    return kind


HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", "spiece.model", "*.jinja", "*.py", "merges.txt", "*.txt.gz")


HUB_ID = re.compile(r"hf:(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
LIKE_AN_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)


def local_path(source: str | os.PathLike) -> pathlib.Path:
    """The path of a checkpoint. Files of a hub id ('hf:OpenGVLab/HoVLE', 'hf:ORG/NAME@REVISION') are downloaded first.

    Nothing is fetched without `hf:`: a mistyped runs/instrct is an error, not another's model.

    Raises:
      UserError: no path has this name, it is no hub id, or the hub cannot be reached.
    """
    path, text = pathlib.Path(source), str(source)
    if path.exists():
        return path
    if not text.startswith("hf:"):
        if LIKE_AN_ID.fullmatch(text):
            raise UserError(f"there is no folder {text}; if it is a model of the hub, give hf:{text}")
        return path
    match = HUB_ID.fullmatch(text)
    if not match:
        raise UserError(f"{text} is not a hub id: give hf:ORG/NAME, or hf:ORG/NAME@REVISION (a branch, tag or commit)")
    return _fetched(match["name"], match["revision"], text)


def _fetched(name, revision, text):
    """The folder in the cache with the files of a repository of the hub."""
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise UserError(
            f"{text} is downloaded from the hub: pip install huggingface_hub, or download the repository's files into "
            "a folder and give that folder"
        ) from None
    options = {"allow_patterns": list(HUB_FILES), "cache_dir": cache_dir("hub"), "revision": revision}
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, **options))
    except Exception as error:  # its own errors, and those of its HTTP library
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{text} cannot be downloaded from the hub ({reason})") from None


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """A Checkpoint from a folder in Hugging Face layout, or a .gguf file.

    Raises:
      UserError: the checkpoint, or a file of it, is missing, broken or not supported.
    """
    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return _open_gguf(path)
    config_path = path / "config.json"
    if _is_open_clip(path):
        return _open_open_clip(path)
    if not config_path.is_file():
        raise UserError(
            f"{config_path} does not exist; a public checkpoint is a folder with config.json (of open_clip: "
            f"{open_clip.CONFIG}) and .safetensors files, or one .gguf file"
        )
    public_config = read_object(config_path)
    family = FAMILIES[family_of(public_config, str(config_path))]
    source = SafetensorsFolder(path, without="open_clip_")
    read = lambda: family.config_from_json(_with_bias(public_config, source.shapes), str(config_path))
    config: Any = _config(read, config_path, source.shapes)
    config = _with_stored_head(config, source)
    if family.kind == "clip":
        config = hf_clip.with_preprocessor(config, path / hf_clip.PREPROCESSOR)
    return Checkpoint(family.kind, config, public_config, family.rules(config), source)


def _is_open_clip(path):
    """Whether a folder holds open_clip's layout, and no config.json of a family that is known here."""
    if not (path / open_clip.CONFIG).is_file():
        return False
    other = path / "config.json"
    return not other.is_file() or read_object(other).get("model_type") not in hf_clip.FAMILIES


def _open_open_clip(path):
    where = path / open_clip.CONFIG
    public_config = read_object(where)
    source = SafetensorsFolder(path, stem="open_clip_")
    config = _config(lambda: open_clip.config_from_json(public_config, str(where)), where, source.shapes)
    return Checkpoint("clip", config, public_config, clips.rules(config), source)


def _config(read, where, shapes):
    """The config that `read` returns, checked against the sizes of the tensors; all that is wrong is a UserError."""
    try:
        config = read()
        check_sizes(config, shapes, str(where))
    except UserError as error:
        raise error if str(where) in str(error) else UserError(f"{where}: {error}") from None
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:  # a value of the wrong kind
        raise UserError(f"{where} cannot be read: {error!r}") from None
    return config


def _with_stored_head(config, source):
    """The config where the file stores a head although the config ties it to the token table.

    A copy of the table is written again by an export; a head that differs counts as not tied, as transformers reads it.
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
    """InternLM2's config with its `bias` from the tensors, where config.json leaves it to the public code's default."""
    key = "llm_config" if "llm_config" in public_config else None
    llm = public_config[key] if key else public_config
    if not isinstance(llm, dict) or llms.with_model_type(llm)["model_type"] != "internlm2" or "bias" in llm:
        return public_config
    llm = llm | {"bias": any(name.endswith(".attention.wqkv.bias") for name in names)}
    return public_config | {key: llm} if key else llm


def _open_gguf(path):
    source = gguf.GGUFFile(path)
    read = lambda: gguf.config_from_metadata(source.metadata, source.shapes, source.rope_factors, str(path))
    config = _config(read, path, source.shapes)
    rules = gguf.rules(config)
    return Checkpoint("llm", config, source.metadata, rules, source)
