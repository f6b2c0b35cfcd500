"""launch/tpu_vm.sh: its commands, its messages, and what `resume` does in each state. No machine is involved."""

import shlex

import pytest

from tests.launch_tools import commands, run_script, tools  # noqa: F401 (a fixture)

PLACE = ["--project=p", "--zone=us-west4-a"]
GIVEN = ["--project", "p", "--zone=us-west4-a", "--name", "hovle", "--accelerator", "v5e-256"]
TRAIN = ["--", "--config", "configs/instruct.py", "--workdir", "/mnt/hovle/runs"]
WORKER = "hovle_jax/launch/worker.sh"
START = f"{WORKER} start --config configs/instruct.py --workdir /mnt/hovle/runs"
STATUS = f"test -x {WORKER} && {WORKER} status || echo not set up"
INSTALL = f"mkdir -p hovle_jax && tar -xzf hovle_jax.tar.gz -C hovle_jax && {WORKER} install"


def tpu_vm(verb, *words):
    return ["gcloud", "compute", "tpus", "tpu-vm", verb, "hovle", *PLACE, *words]


def queued(verb, *words):
    return ["gcloud", "compute", "tpus", "queued-resources", verb, "hovle", *PLACE, *words]


def on_all(command):
    return tpu_vm("ssh", "--worker=all", f"--command={command}")


def on_all_slices(command):
    return queued("ssh", "--node=all", "--worker=all", "--batch-size=all", f"--command={command}")


def dry(verb, *options, train=()):
    result = run_script("tpu_vm.sh", verb, *GIVEN, *options, "--dry-run", *train)
    assert result.returncode == 0, result.stderr
    return commands(result.stdout)


V5E = ["--accelerator-type=v5litepod-256"]
QUEUE = queued("create", "--runtime-version=v2-alpha-tpuv5-lite", *V5E, "--node-id=hovle")
DESCRIBE = queued("describe", "--format=value(state.state)")
DELETE = queued("delete", "--force", "--quiet")


def test_create_and_queue():
    assert dry("create", "--spot") == [tpu_vm("create", "--version=v2-alpha-tpuv5-lite", *V5E, "--spot")]
    assert dry("queue") == [QUEUE]
    several = ["--node-count=2", "--node-prefix=hovle"]
    flags = ["--spot", "--network=my net", "--reserved"]
    made = dry("queue", "--slices=2", "--spot", "--gcloud", "--network=my net", "--gcloud=--reserved")
    assert made == [queued("create", "--runtime-version=v2-alpha-tpuv5-lite", *V5E, *flags, *several)]
    assert "--runtime-version=mine" in dry("queue", "--runtime", "mine")[0]


@pytest.mark.parametrize(
    "given, accelerator, runtime",
    [
        ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v6e-256", "v6e-256", "v2-alpha-tpuv6e"),
        ("v5p-128", "v5p-128", "v2-alpha-tpuv5"),
        ("v4-32", "v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_each_generation_has_its_software(given, accelerator, runtime):
    (words,) = dry("queue", "--accelerator", given)
    assert f"--accelerator-type={accelerator}" in words and f"--runtime-version={runtime}" in words


def test_setup_copies_what_the_workers_need():
    archive, copy, install = dry("setup", "--bucket", "b")
    assert archive[:2] == ["tar", "-czf"] and archive[-6:] == [
        "setup.py",
        "README.md",
        "requirements",
        "hovle_jax",
        "configs",
        "launch",
    ]
    assert copy[4:] == ["scp", archive[2], "hovle:hovle_jax.tar.gz", "--worker=all", *PLACE]
    assert install == on_all(f"{INSTALL} b")
    _, copy, install = dry("setup", "--slices", 2)
    assert copy[4:] == ["scp", archive[2], "hovle:hovle_jax.tar.gz", "--node=all", "--worker=all", *PLACE]
    assert install == on_all_slices(f"{INSTALL} ''")


def test_run_stop_and_logs():
    assert dry("run", train=TRAIN) == [on_all(START)]
    assert dry("run", "--slices=4", train=TRAIN) == [on_all_slices(START)]
    assert dry("stop") == [on_all(f"{WORKER} stop")]
    assert dry("logs") == [tpu_vm("ssh", "--worker=0", f"--command={WORKER} logs")]
    assert dry("logs", "--worker=all") == [on_all(f"{WORKER} logs label")]
    third = queued("ssh", "--node=1", "--worker=3", "--batch-size=all", f"--command={WORKER} logs")
    assert dry("logs", "--slices=2", "--slice=1", "--worker=3") == [third]


def test_status_and_delete_name_both_ways():
    assert dry("status") == [DESCRIBE, queued("describe"), tpu_vm("describe"), on_all(STATUS)]
    assert dry("delete") == [DESCRIBE, DELETE, tpu_vm("delete", "--quiet")]


def test_a_dry_resume_shows_every_step_and_when():
    result = run_script("tpu_vm.sh", "resume", *GIVEN, "--dry-run", *TRAIN)
    made = commands(result.stdout)
    assert made[:4] == [DESCRIBE, DELETE, QUEUE, on_all(STATUS)]
    assert made[-2:] == [on_all(f"{WORKER} stop"), on_all(START)] and on_all(f"{INSTALL} ''") in made
    notes = [line for line in result.stdout.splitlines() if line.startswith("#")]
    assert len(notes) == 5 and "SUSPENDED" in notes[0]


def test_words_arrive_at_the_worker_as_they_were_given():
    """Through two shells: this machine's, and the worker's."""
    words = ["--config", "configs/a b.py", "--workdir=/mnt/hovle/it's $HOME", '--config.name="q" && x; *']
    env = ["--env", "LIBTPU_INIT_ARGS=--one=1 --two=$2", "--env=JAX_LOG=1"]
    (made,) = dry("run", *env, train=["--", *words])
    remote = shlex.split(made[-1].removeprefix("--command="))
    variables = ["LIBTPU_INIT_ARGS=--one=1 --two=$2", "JAX_LOG=1"]
    assert remote == ["env", *variables, WORKER, "start", *words]


def test_a_dry_run_calls_nothing(tools):  # noqa: F811
    for verb in ("create", "queue", "setup", "run", "resume", "logs", "status", "stop", "delete"):
        result = run_script("tpu_vm.sh", verb, *GIVEN, "--dry-run", *TRAIN, tools=tools.path)
        assert result.returncode == 0 and result.stdout, result.stderr
    assert tools.calls == []


MISTAKES = {
    "no verb": ("", ["which of create", "--help"]),
    "unknown verb": ("start", ["unknown verb start", "resume"]),
    "nothing given": ("create", ["--project (or HOVLE_PROJECT)", "--zone", "--name", "--accelerator"]),
    "no zone": ("delete --project=p --name=n", ["delete needs --zone (or HOVLE_ZONE)"]),
    "empty": ("delete --project=", ["--project is empty"]),
    "no value": ("delete --project", ["--project needs a value"]),
    "unknown option": ("create --zones z", ["unknown option --zones", "--help"]),
    "two words": ("create now", ["'now'", "--"]),
    "unknown accelerator": ("create GIVEN --accelerator=v9-8", ["unknown accelerator v9-8", "v5litepod-256", "v4-32"]),
    "no such size": ("create GIVEN --accelerator=v5e-48", ["unknown accelerator v5e-48"]),
    "cores": ("create GIVEN --accelerator=v5p-100", ["unknown accelerator v5p-100", "TensorCores", "v5p-128"]),
    "no slices": ("queue GIVEN --slices=0", ["--slices 0"]),
    "several slices": ("create GIVEN --slices=2", ["queue"]),
    "no arguments": ("run GIVEN", ["--workdir /mnt/hovle/runs"]),
    "no workdir": ("resume GIVEN -- --config configs/instruct.py", ["--workdir /mnt/hovle/runs"]),
    "workdir of a machine": ("run GIVEN -- --workdir runs", ["--workdir /mnt/hovle/runs"]),
    "workdir elsewhere": ("run GIVEN -- --workdir=s3://b/runs", ["gs://BUCKET/runs", "--workdir /mnt/hovle/runs"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_anything_runs(name, tools):  # noqa: F811
    text, expected = MISTAKES[name]
    tools.answer()
    result = run_script("tpu_vm.sh", *text.replace("GIVEN", " ".join(GIVEN)).split(), tools=tools.path)
    assert result.returncode == 1 and not result.stdout and result.stderr.count("\n") == 1
    assert result.stderr.startswith("launch/tpu_vm.sh: ")
    for part in expected:
        assert part in result.stderr
    assert tools.calls == []


def test_without_gcloud_the_remedy_is_named(tmp_path):
    for name in ("bash", "dirname", "tr"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    result = run_script("tpu_vm.sh", "create", *GIVEN, PATH=str(tmp_path))
    assert result.returncode == 1 and "gcloud is not on PATH; install" in result.stderr


def test_the_environment_stands_for_options(tools):  # noqa: F811
    variables = dict(HOVLE_PROJECT="p", HOVLE_ZONE="us-west4-a", HOVLE_NAME="hovle", HOVLE_ACCELERATOR="v5e-256")
    assert run_script("tpu_vm.sh", "queue", tools=tools.path, **variables).returncode == 0
    assert run_script("tpu_vm.sh", "queue", "--name=b", tools=tools.path, **variables, HOVLE_SLICES="2").returncode == 0
    assert tools.calls[0] == QUEUE and tools.calls[1][-2:] == ["--node-count=2", "--node-prefix=b"]


def steps(calls):
    """The calls in words: describe, create, delete, copy, and what was run on the workers."""
    names = []
    for call in calls:
        remote = call[-1].removeprefix("--command=") if call[4] == "ssh" else ""
        found = [word for word in ("install", "status", "stop", "start") if f"{WORKER} {word}" in remote]
        names.append(found[0] if found else call[4])
    return names


AGAIN = ["status", "stop", "start"]
NEW = ["status", "scp", "install", "stop", "start"]
RESUME = {
    "gone": (["GONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], ["not set up"], ["create", *NEW]),
    "suspended": (["SUSPENDED", "GONE", "ACTIVE"], ["not set up"], ["delete", "create", *NEW]),
    "being suspended": (["SUSPENDING", "SUSPENDED", "GONE", "ACTIVE"], ["not set up"], ["delete", "create", *NEW]),
    "failed earlier": (["FAILED", "GONE", "ACTIVE"], ["not set up"], ["delete", "create", *NEW]),
    "waiting": (["WAITING_FOR_RESOURCES", "ACTIVE"], ["not set up"], NEW),
    "alive": (["ACTIVE"], ["a: running", "b: running"], ["status"]),
    "finished": (["ACTIVE"], ["a: finished", "b: finished"], ["status"]),
    "one worker came back": (["ACTIVE"], ["a: running", "b: not running"], AGAIN),
    "told to end": (["ACTIVE"], ["a: stopped", "b: stopped"], AGAIN),
    "failed run": (["ACTIVE"], ["a: failed with code 1", "b: failed with code 1"], AGAIN),
    "one worker is new": (["ACTIVE"], ["a: running", "not set up"], NEW),
}


@pytest.mark.parametrize("case", RESUME)
def test_resume_does_what_is_missing(case, tools):  # noqa: F811
    states, workers, expected = RESUME[case]
    tools.answer(states, workers)
    result = run_script("tpu_vm.sh", "resume", *GIVEN, *TRAIN, tools=tools.path, HOVLE_POLL_SECONDS="0")
    assert result.returncode == 0, result.stderr
    assert [step for step in steps(tools.calls) if step != "describe"] == expected
    assert steps(tools.calls).count("describe") == len(states)
    if "start" in expected:
        assert tools.calls[-1] == on_all(START)


def test_resume_gives_up_on_a_request_that_fails_at_once(tools):  # noqa: F811
    tools.answer(["GONE", "FAILED"])
    result = run_script("tpu_vm.sh", "resume", *GIVEN, *TRAIN, tools=tools.path, HOVLE_POLL_SECONDS="0")
    assert result.returncode == 1 and "the request for hovle failed" in result.stderr
    assert steps(tools.calls) == ["describe", "create", "describe"]


def test_an_error_is_not_taken_for_absence(tools):  # noqa: F811
    """Else a refused question would create machines beside those that are there, or delete the wrong ones."""
    tools.answer(["DENIED"])
    for verb in ("resume", "delete", "status"):
        result = run_script("tpu_vm.sh", verb, *GIVEN, *TRAIN, tools=tools.path)
        assert result.returncode == 1 and "PERMISSION_DENIED: ask the owner" in result.stderr
    assert tools.calls == [DESCRIBE] * 3


def test_delete_and_status_know_where_the_machines_came_from(tools):  # noqa: F811
    tools.answer(["ACTIVE"], ["a: running"])
    run_script("tpu_vm.sh", "delete", *GIVEN, tools=tools.path)
    assert "a: running" in run_script("tpu_vm.sh", "status", *GIVEN, tools=tools.path).stdout
    assert tools.calls == [DESCRIBE, DELETE, DESCRIBE, queued("describe"), on_all(STATUS)]

    tools.answer(["WAITING_FOR_RESOURCES"])
    run_script("tpu_vm.sh", "status", *GIVEN, tools=tools.path)
    assert tools.calls[5:] == [DESCRIBE, queued("describe")]  # there is nobody yet who could answer

    tools.answer(["GONE"])
    run_script("tpu_vm.sh", "delete", *GIVEN, tools=tools.path)
    assert tools.calls[7:] == [DESCRIBE, tpu_vm("delete", "--quiet")]
