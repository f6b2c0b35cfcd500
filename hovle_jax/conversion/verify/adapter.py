"""An adapter over its base: logits, loss and gradients with it and without, and the merged weights."""

import pathlib
from typing import Any

import numpy as np

from hovle_jax.components import Params
from hovle_jax.conversion.verify.llm import EXECUTION, text_inputs, with_loss
from hovle_jax.conversion.verify.reference import Reference
from hovle_jax.errors import UserError
from hovle_jax.formats import peft
from hovle_jax.formats.families import open_checkpoint
from hovle_jax.formats.mapping import to_public
from hovle_jax.model import adapters
from hovle_jax.model.hovle import LanguageModel

MERGED = "merged."


def base_of(folder: pathlib.Path) -> pathlib.Path:
    """The folder of an adapter's base: as adapter_config.json names it, or beside the adapter under its last name.

    Raises:
      UserError: there is none.
    """
    name = str(peft.read_config(folder).get("base_model_name_or_path") or "")
    for path in (pathlib.Path(name), folder.absolute().parent / name.rstrip("/").split("/")[-1]):
        if name and path.is_dir():
            return path
    raise UserError(f"{folder / peft.CONFIG} names the base {name!r}, which is neither there nor beside the adapter")


def verify_adapter(folder: pathlib.Path, reference: Reference) -> None:
    """Compares all that expected.npz has of an LLM's adapter.

    Raises:
      UserError: its base is not there, or is no LLM alone.
    """
    checkpoint = open_checkpoint(base_of(folder))
    if checkpoint.kind != "llm":
        raise UserError(f"{folder}: adapters of an LLM alone can be verified; the base is a {checkpoint.kind}")
    rules = checkpoint.component_rules()
    config, tree = peft.read(folder, rules)
    base, model = {"llm": checkpoint.load()}, LanguageModel(checkpoint.config, EXECUTION)
    tokens, positions, segment_ids = text_inputs(reference, checkpoint.config.vocab_size)
    real = segment_ids > 0

    def logits_of(params: Params) -> Any:
        return model.apply({"params": params["llm"]}, tokens, positions, segment_ids)

    def adapted(adapter: Params):
        return logits_of(adapters.attached({"llm": base["llm"], adapters.COMPONENT: adapter}, config)), None

    logits, _ = with_loss(adapted, reference, tree, lambda grads: peft.public_tensors(rules, grads, gradients=True))
    reference.compare("logits", logits, real)
    reference.compare("base_logits", logits_of(base), real)
    merged = adapters.merged(base, tree, config)
    reference.compare("merged_logits", logits_of(merged), real)
    public = to_public(rules, merged)
    for name in reference.arrays:
        if name.startswith(MERGED) and name.removeprefix(MERGED) in public:
            reference.compare(name, np.asarray(public[name.removeprefix(MERGED)]))
