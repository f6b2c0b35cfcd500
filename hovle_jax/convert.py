"""Public checkpoints in and out, and whether our numbers are those of the reference.

    python -m hovle_jax.convert import SRC DST [--as hovle|llm|teacher]
    python -m hovle_jax.convert export SRC DST [--as llama|gguf|huggingface|open_clip]
                                               [--dtype float32|bfloat16|float16]
    python -m hovle_jax.convert verify DIR [--json]

import: SRC is a folder in Hugging Face layout (InternLM2, InternVL2, HoVLE, Llama, Qwen2, Qwen3, CLIP, SigLIP) or
open_clip's, a .gguf file or hf:ORG/NAME[@REVISION]; DST can then stand where a run's folder can.

export: SRC is a finished run, an import or smol-llm; DST has the public names, shapes and config.json. With --as llama
a base HoVLE becomes a plain Llama, which engines load without HoVLE's code, with vision.safetensors beside it. With
--as gguf a base HoVLE or an LLM becomes one file for llama.cpp, whose name ends in .gguf, for text. A CLIP is written
in the layout that it came in, a trained one in Hugging Face's; --as huggingface or open_clip chooses.

verify: runs the inputs of DIR/expected.npz through the checkpoint in DIR (Hugging Face layout, or .gguf files) and
compares every array that it knows: logits, features, loss, gradients, greedy tokens.
"""

import functools
import json

from absl import flags

from hovle_jax.errors import UserError
from hovle_jax.system import command_line, malloc

USAGE = "import SRC DST | export SRC DST | verify DIR"
PARTS, CLIP_LAYOUTS = ("hovle", "llm", "teacher"), ("huggingface", "open_clip")
FORMATS = ("llama", "gguf", *CLIP_LAYOUTS)  # of --as, for export; PARTS are for import
AS = flags.DEFINE_enum(
    "as",
    None,
    [*PARTS, *FORMATS],
    "import: the part to take (default: all); export: llama = HoVLE as one plain Llama, gguf = a file for llama.cpp, "
    "huggingface or open_clip = the layout of a CLIP",
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "export: the type of the tensors (default: an import's own, else float32); float16 with --as gguf alone",
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object")
TOLERANCE = flags.DEFINE_float("tolerance", 2e-5, "verify: the largest absolute error allowed", lower_bound=0)


def import_(source: str, folder: str) -> None:
    from hovle_jax.conversion.importing import import_checkpoint

    _check_as("import", PARTS)
    import_checkpoint(source, folder, AS.value)
    print(f"imported into {folder}")


def export(source: str, folder: str) -> None:
    _check_as("export", FORMATS)
    if DTYPE.value == "float16" and AS.value != "gguf":
        raise UserError("--dtype float16 is for --as gguf: safetensors are written as float32 or bfloat16")
    from hovle_jax.conversion.downloads import resolve
    from hovle_jax.conversion.exporting import export_model
    from hovle_jax.conversion.gguf_file import export_as_gguf
    from hovle_jax.conversion.llama_folder import export_as_llama

    write = {"llama": export_as_llama, "gguf": export_as_gguf}.get(AS.value or "", export_model)
    if AS.value in CLIP_LAYOUTS:
        write = functools.partial(export_model, layout=AS.value)
    write(resolve(source), folder, DTYPE.value)
    print(f"exported to {folder}")


def _check_as(action, allowed):
    if AS.value not in (None, *allowed):
        instead = f"give {' or '.join(allowed)}, or leave --as out" if allowed else "leave it out"
        raise UserError(f"{action} has no --as {AS.value}: {instead}")


def verify(folder: str) -> None:
    """Prints each array's error; raises UserError where one exceeds the tolerance."""
    from hovle_jax.conversion.verify import verify

    _check_as("verify", ())
    report = verify(folder)
    failed = report.failed(TOLERANCE.value)
    if JSON.value:
        finite = lambda error: error if error == error and abs(error) != float("inf") else str(error)
        errors = {name: finite(error) for name, error in report.errors.items()}
        result = {"passed": report.passed(TOLERANCE.value), "errors": errors, "tokens equal": report.tokens}
        print(json.dumps(result | {"unknown": sorted(report.unknown), "tolerance": TOLERANCE.value}))
    else:
        for name, error in report.errors.items():
            print(f"{error:8.1e}  {name}")
        for name, equal in report.tokens.items():
            print(f"{'equal' if equal else 'DIFFER':>8}  {name}")
        for name in sorted(report.unknown):
            print(f"{'unknown':>8}  {name}")
    if not report.errors and not report.tokens:
        raise UserError(f"{folder}/expected.npz holds no array that can be compared")
    if failed:
        raise UserError(f"{', '.join(failed)} differ by more than {TOLERANCE.value:g} (--tolerance)")


ACTIONS = {"import": (import_, 2), "export": (export, 2), "verify": (verify, 1)}


def main(arguments: list[str]) -> None:
    command_line.dispatch(ACTIONS, arguments, f"python -m hovle_jax.convert {USAGE}")


if __name__ == "__main__":
    command_line.run(main, USAGE, memory=malloc.share_freed_memory)
