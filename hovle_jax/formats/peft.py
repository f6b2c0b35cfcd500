"""Adapters in PEFT's layout: adapter_config.json, and adapter_model.safetensors with names of the base's modules.

    base_model.model.MODULE.lora_A.weight [r, in], .lora_B.weight [out, r], DoRA's .lora_magnitude_vector [out]

The base's own rules say which of our kernels a module is. Where a module is several of our kernels (InternLM2's wqkv),
all have its A, and B is split as the weight is. Trained here they have an A each: such a module is written with the sum
of their ranks and, as PEFT's patterns allow, with an alpha of its own that keeps the scale.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hovle_jax.errors import UserError
from hovle_jax.formats.fields import count, flag, number, read_object
from hovle_jax.formats.mapping import Rule
from hovle_jax.formats.source import SafetensorsFolder
from hovle_jax.model.adapters import KERNEL, AdapterConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, WEIGHT = "base_model.model.", ".weight"
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
NAME = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, (A, B, MAGNITUDE)))})")
# What changes the numbers and is not known here; each must be empty or as said.
REFUSED = {"bias": "none", "fan_in_fan_out": False, "lora_bias": False, "use_qalora": False, "use_bdlora": False}
EMPTY = (
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)

METADATA = {"format": "pt"}
Tree = dict[str, dict[str, np.ndarray]]  # {kernel's path without 'kernel': {'a', 'b', ...}}


@dataclasses.dataclass(frozen=True)
class Module:
    """A module of the base: its rule, and its layer's number in the stack; None outside one."""

    rule: Rule
    layer: int | None


def modules_of(rules: list[Rule]) -> dict[str, Module]:
    """{public name of a module with a weight: Module}."""
    found = {}
    for rule in rules:
        if not all(path.split("/")[-1] == KERNEL for path in rule.ours):
            continue
        for layer, name in enumerate(rule.names()):
            found[name.removesuffix(WEIGHT)] = Module(rule, None if rule.num_layers is None else layer)
    return found


def is_adapter(folder: pathlib.Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """adapter_config.json. Raises UserError where it is of no LoRA, or asks for what is not known here."""
    where = folder / CONFIG
    found = read_object(where)
    if found.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type={found.get('peft_type')!r}; LORA is supported")
    wrong = [key for key, value in REFUSED.items() if found.get(key, value) not in (value, None)]
    wrong += [key for key in EMPTY if found.get(key)]
    if wrong:
        raise UserError(f"{where}: {wrong[0]}={found[wrong[0]]!r} is not supported")
    return found


def read(folder: pathlib.Path, rules: list[Rule]) -> tuple[AdapterConfig, Tree]:
    """An adapter of a base whose rules are given.

    Layers without an adapter, and ranks below the largest, are zeros; a scale of its own is multiplied into b.

    Raises:
      UserError: it is none, is broken, or belongs to another base.
    """
    config, source, modules = read_config(folder), SafetensorsFolder(folder, stem="adapter_model"), modules_of(rules)
    where = str(folder / CONFIG)
    stabilized, decomposed = (flag(config, key, False, where) for key in ("use_rslora", "use_dora"))
    alpha = number(config, "lora_alpha", 8, where)
    parts = _grouped(source, modules)
    ranks = {module: source.shapes[names[A]][0] for module, names in parts.items()}
    rank = max(ranks.values())
    ours = AdapterConfig(rank, alpha * _ratio(config, rank, where, stabilized), "", stabilized, decomposed)
    tree: Tree = {}
    for module, names in parts.items():
        own_alpha = _pattern(config.get("alpha_pattern"), module, alpha)
        scale = dataclasses.replace(ours, rank=ranks[module], alpha=float(own_alpha)).scale / ours.scale
        _put(tree, modules[module], {part: source.read(name) for part, name in names.items()}, rank, scale)
    if decomposed:
        _check_layers(parts, modules, where)
    names = ",".join(tree)
    return dataclasses.replace(ours, targets=names), tree


def _check_layers(parts, modules, where):
    """Raises UserError where a layer has no lengths of its own: those of its kernel are not known here."""
    for module in map(modules.__getitem__, parts):
        for name in module.rule.names():
            if name.removesuffix(WEIGHT) not in parts:
                raise UserError(f"{where}: with use_dora all layers need an adapter, and {name} has none")


def _ratio(config, rank, where, stabilized):
    """What alpha is multiplied by, so that the scale of the config's own rank is that of the largest."""
    own = count(config, "r", where=where)
    return math.sqrt(rank / own) if stabilized else rank / own


def _pattern(patterns, module, default):
    """What a pattern of PEFT says of a module."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _grouped(source, modules) -> dict[str, dict[str, str]]:
    """{module: {part: tensor}}. Raises UserError for names that the base does not have, and for half an adapter."""
    parts: dict[str, dict[str, str]] = {}
    for name in source.shapes:
        match = NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{source.file_of(name)}: {name} is no tensor of a LoRA that is known here")
        if match["module"] not in modules:
            raise UserError(
                f"{source.file_of(name)}: the base has no {match['module']}; the adapter belongs to another model"
            )
        parts.setdefault(match["module"], {})[match["part"]] = name
    for module, found in parts.items():
        if missing := [part for part in (A, B) if part not in found]:
            raise UserError(f"{source.file_of(None)}: {module} has no {missing[0]}")
        a, b = (source.shapes[found[part]] for part in (A, B))
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UserError(f"{source.file_of(None)}: {module} has lora_A {list(a)} and lora_B {list(b)}: no rank fits")
    if not parts:
        raise UserError(f"{source.file_of(None)} holds no adapter")
    return parts


def _put(tree, module, tensors, rank, scale):
    """A module's parts into the tree, in each of our kernels that it is."""
    rule, count = module.rule, len(tensors[A])
    pieces = rule.transform.split(tensors[B] if scale == 1 else tensors[B] * np.float32(scale))
    lengths = rule.transform.split(tensors[MAGNITUDE].reshape(-1)) if MAGNITUDE in tensors else [None] * len(pieces)
    for path, b, length in zip(rule.ours, pieces, lengths, strict=True):
        leaves = tree.setdefault(path.removesuffix(f"/{KERNEL}"), {})
        a = tensors[A].T
        made = {"a": np.pad(a, ((0, 0), (0, rank - count))), "b": np.pad(b, ((0, rank - count), (0, 0)))}
        made |= {} if length is None else {"magnitude": length}
        for name, value in made.items():
            if module.layer is None:
                leaves[name] = value
            else:
                leaves.setdefault(name, np.zeros((rule.num_layers, *value.shape), np.float32))[module.layer] = value


def write(folder: pathlib.Path, rules: list[Rule], tree: Mapping[str, Any], config: AdapterConfig, base: str) -> None:
    """Writes an adapter of a base whose rules are given.

    Args:
      base: what adapter_config.json calls the base.
    Raises:
      UserError: a kernel is part of a module whose other parts have no adapter.
    """
    every, tensors = modules_of(rules), public_tensors(rules, tree)
    names = [name for name in every if f"{PREFIX}{name}.{A}" in tensors]
    ranks = {name: len(tensors[f"{PREFIX}{name}.{A}"]) for name in names}
    ranks = {name: rank for name, rank in ranks.items() if rank != config.rank}
    alpha = lambda rank: config.scale * (math.sqrt(rank) if config.rank_stabilized else rank)
    whole = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
    whole |= {"r": config.rank, "lora_alpha": _plain(config.alpha), "lora_dropout": 0.0, "bias": "none"}
    whole |= {"target_modules": _targets(names, every), "fan_in_fan_out": False, "modules_to_save": None}
    whole |= {"use_rslora": config.rank_stabilized, "use_dora": config.weight_decomposed}
    whole |= {"rank_pattern": ranks, "alpha_pattern": {name: _plain(alpha(rank)) for name, rank in ranks.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}, folder / WEIGHTS, METADATA)
    (folder / CONFIG).write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")


def public_tensors(rules: list[Rule], tree: Mapping[str, Any], gradients: bool = False) -> dict[str, np.ndarray]:
    """{public name: array} of an adapter {kernel's path without 'kernel': {'a', 'b', ...}}.

    Args:
      gradients: the tree is the gradients of one that was read: what a module's kernels share has their sum.
    """
    tensors = {}
    for name, module in modules_of(rules).items():
        if any(_name(path) in tree for path in module.rule.ours):
            for part, value in _parts(name, module, tree, gradients):
                tensors[f"{PREFIX}{name}.{part}"] = value
    return tensors


def _name(path):
    return path.removesuffix(f"/{KERNEL}")


def _plain(value):
    return int(value) if float(value).is_integer() else float(value)


def _parts(name, module, tree, gradients) -> Iterator[tuple[str, np.ndarray]]:
    """(part, array) of a module."""
    rule = module.rule
    missing = [_name(path) for path in rule.ours if _name(path) not in tree]
    if missing:
        raise UserError(f"{name} is one module in the public layout, and {missing[0]} has no adapter: give it one too")
    take = lambda leaf: np.asarray(leaf if module.layer is None else leaf[module.layer])
    leaves = [{key: take(leaf) for key, leaf in tree[_name(path)].items()} for path in rule.ours]
    a, b = ([each[key] for each in leaves] for key in ("a", "b"))
    if gradients:
        a = [np.sum(a, axis=0)]
    elif all(np.array_equal(a[0], each) for each in a):
        a = a[:1]
    else:
        rank, total = a[0].shape[1], a[0].shape[1] * len(leaves)
        b = [np.pad(piece, ((rank * i, total - rank * (i + 1)), (0, 0))) for i, piece in enumerate(b)]
    yield A, np.concatenate(a, axis=1).T
    yield B, rule.transform.join(*b)
    if "magnitude" in leaves[0]:
        yield MAGNITUDE, rule.transform.join(*(each["magnitude"] for each in leaves))


def _targets(names, every):
    """The last parts of the names where these name no other module, else the names."""
    ends = sorted({name.split(".")[-1] for name in names})
    others = {name.split(".")[-1] for name in every.keys() - set(names)}
    return ends if not others & set(ends) else sorted(names)
