"""Tests run on the CPU with eight devices, so that meshes can be tested; set before JAX is imported anywhere."""

import functools
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

# Threads of XLA's CPU backend, else as many as devices. Each device does a step's independent collectives in its own
# order: with every thread waiting in one that the others have not come to, the step stands still.
os.environ.setdefault("NPROC", "32")

# What one worker or command has compiled, the others need not compile again. The first process of a session makes the
# folder; those that it starts inherit its name.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_made = None
if _CACHE not in os.environ:
    _made = os.environ[_CACHE] = tempfile.mkdtemp(prefix="hovle_jax_compiled_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


MOST_MAPPINGS = 25_000

# Files whose tests have the mark `quick`: fast, of every part, together under a minute on two cores ...
QUICK_FILES = """
accelerators check_numbers chips chunked_loss config_help configs goodput hlo host launch launch_gke launch_tpu_vm main
mixture packing progress project records report rules scorers sources tiling
""".split()
# ... but these, of seconds each.
NOT_QUICK = (
    "test_a_run_measures_itself_and_traces_the_steps_that_it_was_asked_for",
    "test_an_fsdp_step_on_",
    "test_answers_fill_rows_of_",
    "test_a_step_finds_its_memory_again",
    "test_packed_samples_have_the_losses_and_gradients_of_rows_of_their_own[p",
    "test_a_run_does_not_go_on_with_other_data",
    "test_plots_are_",
)


def pytest_collection_modifyitems(items):
    quick_files = {f"test_{name}" for name in QUICK_FILES}
    for item in items:
        slow = item.get_closest_marker("slow") or item.name.startswith(NOT_QUICK)
        if item.path.stem in quick_files and not slow:
            item.add_marker("quick")


def pytest_runtest_teardown(item, nextitem):
    """A compiled program takes dozens of the memory mappings that Linux allows a process (65,530), after which it dies
    without a word: they go between two files once there are many."""
    maps = Path("/proc/self/maps")
    done = nextitem is None or nextitem.path != item.path
    if done and maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


def pytest_collection_finish(session):
    # What has been imported stays: to look through all of it again and again takes a tenth of the time to trace.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_unconfigure(config):
    if _made:
        shutil.rmtree(_made, ignore_errors=True)


@pytest.fixture(scope="module")
def quick_compilation():
    """Half of the time to compile; the numbers are those of the same program."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def micro_corpus(monkeypatch):
    """Runs read the micro corpus, whatever their config says."""
    from hovle_jax.corpora import loading
    from tests import micro

    monkeypatch.setattr(loading, "load_corpus", lambda config, split, say=print: micro.corpus())


@pytest.fixture
def start_hosts(tmp_path):
    """Function of (name, hosts, devices of each, runs) -> jobs.Job."""
    from tests.jobs import starting

    with starting(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """An empty cache folder for the tests of a file, in which nothing is indexed yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOVLE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    """Kind of `source_files.ALL` -> its path; written once."""
    from tests.source_files import ALL

    return functools.cache(lambda kind: ALL[kind](tmp_path_factory.mktemp(kind)))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The URL of a folder on a server of Google Cloud Storage, in this process."""
    for package, name in (("gcp_storage_emulator", "gcp-storage-emulator"), ("gcsfs", "gcsfs")):
        pytest.importorskip(package, reason=f"pip install {name}")
    from tests import gcs_server, jobs

    port = jobs.free_port()
    for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HOVLE_CACHE", str(tmp_path / "cache"))
    with gcs_server.create_server(port, "bucket"):
        yield "gs://bucket/runs"
