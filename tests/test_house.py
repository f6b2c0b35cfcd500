"""The order of the packages: who may import whom, read from every import of every file, those in functions too."""

import ast
import collections
import dataclasses
import functools
import graphlib
import pathlib

from hovle_jax.config import MeshConfig

ROOT = pathlib.Path(__file__).parents[1] / "hovle_jax"

# From the ground up. A package imports itself and rows before its own; those of one row do not import each other.
ORDER = (
    ("errors",),
    ("system", "hardware"),
    ("model", "report"),
    ("config",),
    ("recipes", "sharding"),
    ("hosts",),
    ("components",),
    ("checkpoints",),
    ("data",),
    ("formats", "corpora"),
    ("inference",),
    ("retrieval",),
    ("conversion", "evaluation", "serving", "training"),
    ("aot",),
    ("commands",),  # the loose files that can be run
)
MOST_LOOSE_FILES = 5  # beside the commands
WITHOUT_TRAINING = (
    "conversion",
    "evaluation",
    "inference",
    "serving",
    "retrieval",
    "attention",
    "generate",
    "chat",
    "serve",
    "bench",
    "evaluate",
    "probe",
    "search",
    "convert",
)
# What knows of devices or of a mesh, and so has no place in model/; the names of mesh axes neither.
OF_DEVICES = {
    "AbstractMesh", "Mesh", "NamedSharding", "PartitionSpec", "all_gather", "axis_index", "device_count", "devices",
    "get_abstract_mesh", "get_mesh", "local_device_count", "local_devices", "make_mesh", "psum", "set_mesh",
    "shard_map", "with_sharding_constraint",
}  # fmt: skip
MESH_AXES = {field.name for field in dataclasses.fields(MeshConfig)}
# Imported in functions alone: extras, and what takes seconds.
LAZY = {
    "ftfy", "gguf", "jinja2", "matplotlib", "openpyxl", "pyarrow", "resvg_py", "tensorboardX", "tensorflow",
    "tensorflow_datasets", "tokenizers", "torch", "trackio", "transformers", "wandb", "xllamacpp",
}  # fmt: skip

# What still breaks a rule, as the tests below print it. A line that is no longer true fails too: take it out.
KNOWN = {"places": set(), "order": set(), "circles": set(), "training": set(), "model": set(), "lazy": set()}


# ---------------------------------------------------------------------------------------------------------------------
# Files and their imports. A file is named 'data.batch'; a package's __init__ is 'data', and that of hovle_jax ''.


@functools.cache
def trees():
    """{name of a file: its syntax tree}."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def full_names(nodes):
    """What is imported among syntax nodes: 'jax.numpy', 'hovle_jax.data.batch.Sample'."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"write relative imports in full: {ast.unparse(node)}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(full_name):
    """'hovle_jax.data.batch.Sample' -> 'data.batch': the longest beginning that is a file."""
    parts = full_name.split(".")[1:]
    while ".".join(parts) not in trees():
        parts.pop()
    return ".".join(parts)


@functools.cache
def imports():
    """{file: the other files of ours that it imports}; hovle_jax itself, for its version, anyone may import."""
    found = {}
    for name, tree in trees().items():
        ours = {x for x in full_names(ast.walk(tree)) if x.split(".")[0] == "hovle_jax"}
        found[name] = {file_of(x) for x in ours - {"hovle_jax", "hovle_jax.__version__"}} - {name}
    return found


def is_command(name):
    """A loose file that can be run. A package with a __main__ is a package."""
    guards = [node.test for node in trees()[name].body if isinstance(node, ast.If)]
    return (ROOT / f"{name}.py").is_file() and any("__main__" in ast.unparse(test) for test in guards)


def package_of(name):
    """The member of ORDER that a file belongs to; the public API in hovle_jax itself is on top."""
    return "commands" if not name or is_command(name) else name.split(".")[0]


def row_of(name):
    """Which row of ORDER a file stands in; None where its package has no place."""
    return next((i for i, row in enumerate(ORDER) if package_of(name) in row), None)


def check(rule, found):
    """Fails for what is broken and not known, and for what is known and no longer broken."""
    assert found - KNOWN[rule] == set(), f"{rule}: new"
    assert KNOWN[rule] - found == set(), f"{rule}: no longer so; take it out of KNOWN"


# ---------------------------------------------------------------------------------------------------------------------
# The rules


def test_every_package_has_its_place():
    check("places", {package_of(name) for name in trees() if row_of(name) is None})


def test_imports_go_down():
    broken = set()
    for name, others in imports().items():
        for other in others:
            same, rows = package_of(other) == package_of(name) != "commands", (row_of(name), row_of(other))
            if not same and None not in rows and rows[1] >= rows[0]:
                broken.add(f"{name} -> {other}")
    check("order", broken)


def test_files_of_a_package_form_no_circle():
    """Between packages the order has none; within one, two files that need each other are one file or three."""
    found = set()
    for package in {package_of(name) for name in trees()} - {"commands"}:
        own = {
            name: {x for x in others if package_of(x) == package}
            for name, others in imports().items()
            if package_of(name) == package
        }
        try:
            graphlib.TopologicalSorter(own).prepare()
        except graphlib.CycleError as error:
            found.add(" - ".join(sorted(set(error.args[1]))))
    check("circles", found)


def test_no_file_imports_a_command():
    found = {f"{name} -> {x}" for name, others in imports().items() for x in others if x and is_command(x)}
    assert found == set()


def test_answers_and_conversions_need_nothing_of_training():
    """Not over others either: what they import, and what that imports."""
    way = collections.deque(name for name in trees() if name.split(".")[0] in WITHOUT_TRAINING)
    reached, found = set(way), set()
    while way:
        name = way.popleft()
        trainings = {x for x in imports()[name] if x.split(".")[0] == "training"}
        found |= {f"{name} -> {x}" for x in trainings}
        more = imports()[name] - trainings - reached
        reached |= more
        way.extend(more)
    check("training", found)


def test_the_model_knows_no_device_and_no_mesh():
    found = set()
    for name, tree in trees().items():
        if package_of(name) != "model":
            continue
        found |= {f"{name} -> {x}" for x in imports()[name] if package_of(x) not in ("model", "errors")}
        for node in ast.walk(tree):
            words = {getattr(node, "attr", None), getattr(node, "id", None)} & OF_DEVICES
            words |= {x.split(".")[-1] for x in full_names([node])} & OF_DEVICES
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words |= {node.value} & MESH_AXES
            found |= {f"{name}: {word}" for word in words}
    check("model", found)


def test_few_files_lie_loose():
    loose = {name for name in trees() if name and (ROOT / f"{name}.py").is_file() and not is_command(name)}
    assert len(loose) <= MOST_LOOSE_FILES, sorted(loose)


def test_what_is_heavy_or_an_extra_is_imported_where_it_is_used():
    found = set()
    for name, tree in trees().items():
        top = {full.split(".")[0] for full in full_names(tree.body)} & LAZY
        found |= {f"{name} -> {x}" for x in top}
    check("lazy", found)
