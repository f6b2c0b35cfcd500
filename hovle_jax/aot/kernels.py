"""Cycles of Pallas kernels, from libtpu's own schedule of each.

A kernel's call in a compiled program has no estimate, but the whole kernel stands in it. Here it is compiled once more,
alone, by a process of its own in which libtpu writes down the instruction bundles that it made: a core issues one in a
cycle. What was read is kept in the cache folder, by kernel, shapes, chip and version of libtpu.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

from hovle_jax.aot.hlo.collectives import PALLAS
from hovle_jax.aot.hlo.text import Computation, Instruction
from hovle_jax.hardware.topology import Topology
from hovle_jax.system.cache import cache_dir

_FLAGS = "LIBTPU_INIT_ARGS"
_DUMP = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles --xla_jf_dump_to="
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
_BUNDLE = re.compile(r"^\s*(?:0x)?([0-9a-f]+)\s+(L[HBE]|P[BF]|CT)?\s*:(?: >)*\s*\{", re.MULTILINE)
_TYPES = {"bf": "bfloat", "f": "float", "s": "int", "u": "uint", "pred": "bool"}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What libtpu made of a kernel."""

    bundles: int  # of all of it, each once
    longest: int  # the most bundles between two branches: what a step of the grid does at least
    loops: int  # inside a step, whose bundles count once, as nothing says how often they run
    steps: int  # of the grid; of a core's share of it, where a chip's cores share its parallel dimensions


def call_of(computation: Computation, x: Instruction) -> dict[str, Any]:
    """A kernel's call as JSON: what is compiled again, without where it was written."""
    config = json.loads(x.attributes.partition("backend_config=")[2])["custom_call_config"]
    config.pop("debug_locations", None)
    operands = [array for name in x.operands for array in _arrays(computation.instructions[name].shape)]
    return {"operands": operands, "results": _arrays(x.shape), "config": config}


def schedule(call: dict[str, Any], target: Topology) -> Schedule | None:
    """Of a call on a chip of the target's generation; None where libtpu does not compile the kernel alone."""
    text = json.dumps({"call": call, "generation": target.generation}, sort_keys=True)
    fields = [field.name for field in dataclasses.fields(Schedule)]
    version = f"{fields} {importlib.metadata.version('libtpu')} {os.environ.get(_FLAGS, '')}"
    path = cache_dir("kernels") / f"{hashlib.sha256((version + text).encode()).hexdigest()[:32]}.json"
    if not path.exists():
        found = _compiled(text)
        if found is None:
            return None
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(dataclasses.asdict(found)))
        fresh.replace(path)
    return Schedule(**json.loads(path.read_text()))


def _compiled(text):
    """Compiles in a process of its own: libtpu reads its flags when it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join([str(pathlib.Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        own = {_FLAGS: f"{os.environ.get(_FLAGS, '')} {_DUMP}{folder}", "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
        command = [sys.executable, "-m", "hovle_jax.aot.kernels"]
        made = subprocess.run(command, input=text, text=True, capture_output=True, env=os.environ | own, check=False)
        texts = [path.read_text() for path in pathlib.Path(folder).glob("*[0-9]-final_bundles.txt")]
    kernels = [text for text in texts if re.search(r"entry bundle: .*custom-call\(", text)]
    return None if made.returncode or len(kernels) != 1 else read(kernels[0])


def read(text: str) -> Schedule:
    """The text of a kernel's final bundles; the sizes of its grid stand beside each operand that is read in blocks."""
    grid = list(map(int, re.findall(r"\d+", (re.findall(r"iteration_bounds: \(([\d, ]+)\)", text) or [""])[0])))
    found = [(int(address, 16), label) for address, label in _BUNDLE.findall(text)]
    branches = [place for place, label in found if label]
    longest = max(end - start for start, end in zip([0, *branches], [*branches, len(found)]))
    loops = sum(label == "LB" for _, label in found) - (math.prod(grid) > 1)
    return Schedule(len(found), longest, max(loops, 0), math.prod(grid))


def _arrays(shape):
    """'(bf16[2,128]{1,0}, s32[])' -> [['bfloat16', [2, 128]], ['int32', []]]."""
    name = lambda short: re.sub(r"^(bf|f|s|u|pred)(\d*)$", lambda found: _TYPES[found[1]] + found[2], short)
    found = _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", shape))
    return [[name(short), [int(size) for size in re.findall(r"\d+", sizes)]] for short, sizes in found]


def _compile_alone(call, generation):
    """libtpu writes the schedule."""
    import jax

    dimensions = Topology(generation, ()).kind.dimensions
    sharding = jax.sharding.SingleDeviceSharding(Topology(generation, (2, 2, 1)[:dimensions]).devices()[0])
    shapes = lambda arrays, where: [jax.ShapeDtypeStruct(tuple(s), dtype, sharding=where) for dtype, s in arrays]
    operands, results = shapes(call["operands"], sharding), shapes(call["results"], None)
    config = json.dumps({"custom_call_config": call["config"]})
    kernel = jax.ffi.ffi_call(PALLAS, results, custom_call_api_version=1, legacy_backend_config=config)
    # Where a program was given less or more of it, the kernel compiled in it has fitted there.
    jax.jit(kernel).lower(*operands).compile(compiler_options={"xla_tpu_scoped_vmem_limit_kib": str(96 * 1024)})


if __name__ == "__main__":
    _compile_alone(**json.load(sys.stdin))
