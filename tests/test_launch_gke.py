"""launch/gke.sh and its manifest: the commands and the YAML. No cluster is involved."""

import json
import shlex
import signal

import pytest
import yaml

from hovle_jax.hosts.preemption import ENDED_UNSAVED
from hovle_jax.system.signals import ASKING
from tests.launch_tools import LAUNCH, ROOT, commands, run_script, tools  # noqa: F811, F401 (a fixture)

IMAGE = "europe-docker.pkg.dev/p/r/hovle_jax:1"
PLACE = ["--cluster=c", "--project=p", "--zone=us-west4-a"]
GIVEN = ["--project=p", "--zone=us-west4-a", "--cluster=c", "--name=hovle", "--accelerator=v5e-256", f"--image={IMAGE}"]
GIVEN += ["--bucket=my-bucket"]
WORDS = ["--config", "configs/a b.py", '--config.name="q" \\ & | $HOME', "--workdir=/mnt/hovle/runs"]
TRAIN = ["--", *WORDS]


def dry(verb, *options, train=()):
    result = run_script("gke.sh", verb, *GIVEN, *options, "--dry-run", *train)
    assert result.returncode == 0, result.stderr
    return commands(result.stdout)


def test_cluster_with_its_bucket():
    create, attach = dry("cluster", "--slices=2")
    made = ["--tpu-type=v5litepod-256", "--num-slices=2", "--on-demand"]
    assert create[:6] == ["xpk", "cluster", "create", *made] and create[-3:] == PLACE
    assert attach[:6] == ["xpk", "storage", "attach", "hovle", "--type=gcsfuse", "--bucket=my-bucket"]
    assert "--mount-point=/mnt/hovle" in attach and "--auto-mount=true" in attach and "--readonly=false" in attach
    assert "--spot" in dry("cluster", "--spot")[0]
    reserved = dry("cluster", "--reservation", "mine")[0]
    assert "--reservation=mine" in reserved and "--on-demand" not in reserved


def test_both_ways_mount_the_bucket_alike():
    attach = dry("cluster")[1]
    (options,) = [word.removeprefix("--mount-options=") for word in attach if word.startswith("--mount-options=")]
    assert pod(manifest())["volumes"][0]["csi"]["volumeAttributes"]["mountOptions"] == options


def test_image():
    build, push = dry("image")
    dockerfile = f"--file={LAUNCH / 'Dockerfile'}"
    options = ["--platform=linux/amd64", "--build-arg=RUN_AS=root", dockerfile, f"--tag={IMAGE}"]
    assert build == ["docker", "build", *options, str(ROOT)]
    assert push == ["docker", "push", IMAGE]


def test_the_image_has_what_it_copies_and_starts():
    lines = [line.split() for line in (LAUNCH / "Dockerfile").read_text().splitlines()]
    copied = [word for words in lines if words[:1] == ["COPY"] for word in words[1:-1]]
    assert {"setup.py", "README.md", "requirements", "hovle_jax", "configs", "launch/pod.sh"} == set(copied)
    assert all((ROOT / word).exists() for word in copied)
    assert ["USER", "${RUN_AS}"] in lines and ["ARG", "RUN_AS=hovle"] in lines, "not root unless asked for"


@pytest.mark.parametrize("name", ['my-bucket", evil: "x', "a: b", "a #b", "{x}", "&x|y\\z", "a\nb: c", "true"])
def test_values_stay_values_in_the_manifest(name):
    made = manifest("--bucket", name)
    assert pod(made)["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == name


def test_run_hands_the_words_on_through_a_shell():
    (made,) = dry("run", "--slices=2", "--env=LIBTPU_INIT_ARGS=--a=1 --b", "--env", "B=2", train=TRAIN)
    assert made[:6] == ["xpk", "workload", "create", "--workload=hovle", "--tpu-type=v5litepod-256", "--num-slices=2"]
    assert f"--docker-image={IMAGE}" in made and made[-3:] == PLACE
    assert "--restart-on-exit-codes=1,2,75" in made  # xpk starts again at 127 and above by itself
    assert [word for word in made if word.startswith("--env")] == ["--env=LIBTPU_INIT_ARGS=--a=1 --b", "--env=B=2"]
    (command,) = [word.removeprefix("--command=") for word in made if word.startswith("--command=")]
    assert shlex.split(command) == ["exec", "launch/pod.sh", *WORDS]


def test_the_other_verbs():
    assert dry("list") == [["xpk", "workload", "list", *PLACE]]
    assert dry("delete") == [["xpk", "workload", "delete", "--workload=hovle", *PLACE]]
    assert dry("delete-cluster") == [["xpk", "cluster", "delete", *PLACE]]
    assert dry("unapply") == [["kubectl", "delete", "jobset", "hovle"]]
    one, everybody = dry("logs")[0], dry("logs", "--all")[0]
    assert one[:3] == everybody[:3] == ["kubectl", "logs", "--follow"]
    assert "jobset-name=hovle,jobset.sigs.k8s.io/job-index=0," in one[-1] and one[-1].endswith("completion-index=0")
    assert everybody[-1] == "--selector=jobset.sigs.k8s.io/jobset-name=hovle" and "--prefix" in everybody


def manifest(*options):
    result = run_script("gke.sh", "manifest", *GIVEN, *options, *TRAIN)
    assert result.returncode == 0 and "${" not in result.stdout, result.stderr + result.stdout
    return yaml.safe_load(result.stdout)


def job(made):
    return made["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod(made):
    return job(made)["template"]["spec"]


def test_the_manifest_says_what_was_given():
    made = manifest("--slices=2", '--env=A=--x=1 & | \\ "y"', "--env", "B=", "--service-account=trainer")
    assert made["kind"] == "JobSet" and made["metadata"]["name"] == "hovle"
    assert made["spec"]["replicatedJobs"][0]["replicas"] == 2
    (container,) = pod(made)["containers"]
    assert container["image"] == IMAGE and container["command"] == ["launch/pod.sh"] and container["args"] == WORDS
    assert container["env"] == [{"name": "A", "value": '--x=1 & | \\ "y"'}, {"name": "B", "value": ""}]
    assert container["volumeMounts"] == [{"name": "bucket", "mountPath": "/mnt/hovle"}]
    assert pod(made)["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    assert pod(made)["serviceAccountName"] == "trainer"
    assert container["env"] != pod(manifest())["containers"][0]["env"] == []


def test_preemptions_are_not_counted_as_failures_are():
    """A slice's Job fails for the reason PodFailurePolicy where its own rules say so, else for its backoffLimit."""
    made = manifest()
    policy, of_pods = made["spec"]["failurePolicy"], job(made)["podFailurePolicy"]["rules"]
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert policy["maxRestarts"] == 20 and job(made)["backoffLimit"] == 0
    assert [rule["action"] for rule in of_pods] == ["FailJob"] * 2 and pod(made)["restartPolicy"] == "Never"
    assert of_pods[0]["onPodConditions"] == [{"type": "DisruptionTarget"}]
    codes = of_pods[1]["onExitCodes"]
    assert codes["containerName"] == pod(made)["containers"][0]["name"] and codes["operator"] == "In"
    told_to_end = {128 + number for number in ASKING}
    assert set(codes["values"]) == told_to_end | {ENDED_UNSAVED, 128 + signal.SIGABRT}


@pytest.mark.parametrize(
    "accelerator, label, topology, hosts, chips",
    [
        ("v5e-1", "tpu-v5-lite-podslice", "1x1", 1, 1),
        ("v5e-16", "tpu-v5-lite-podslice", "4x4", 4, 4),
        ("v5litepod-256", "tpu-v5-lite-podslice", "16x16", 64, 4),
        ("v6e-128", "tpu-v6e-slice", "8x16", 32, 4),
        ("v5p-8", "tpu-v5p-slice", "2x2x1", 1, 4),
        ("v5p-128", "tpu-v5p-slice", "4x4x4", 16, 4),
        ("v4-32", "tpu-v4-podslice", "2x2x4", 4, 4),
    ],
)
def test_machines_of_an_accelerator(accelerator, label, topology, hosts, chips):
    """The numbers are Google's: chips of a v4 or v5p are half of its TensorCores, a training host has four."""
    made = manifest(f"--accelerator={accelerator}")
    selector = pod(made)["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == label
    assert selector["cloud.google.com/gke-tpu-topology"] == topology
    assert job(made)["parallelism"] == job(made)["completions"] == hosts
    assert pod(made)["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_a_topology_has_as_many_chips_as_its_type(size):
    for generation, cores in (("v4", 2), ("v5p", 2), ("v6e", 1), ("v5e", 1)):
        if cores == 1 and size > 256:
            continue
        made = manifest(f"--accelerator={generation}-{size}")
        sides = pod(made)["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
        chips = 1
        for side in sides:
            chips *= int(side)
        assert chips == size // cores == job(made)["parallelism"] * 4


def test_apply_gives_the_manifest_to_kubectl(tools):  # noqa: F811
    result = run_script("gke.sh", "apply", *GIVEN, *TRAIN, tools=tools.path)
    assert result.returncode == 0 and tools.calls == [["kubectl", "apply", "--filename=-"]]
    assert yaml.safe_load((tools.path / "applied").read_text()) == manifest()


def test_the_dry_apply_can_be_pasted(tools):  # noqa: F811
    made = run_script("gke.sh", "apply", *GIVEN, "--dry-run", *TRAIN).stdout
    assert tools.calls == []
    (tools.path / "pasted.sh").write_text(made)
    result = run_script(tools.path / "pasted.sh", tools=tools.path)
    assert result.returncode == 0 and tools.calls == [["kubectl", "apply", "--filename=-"]]
    assert json.dumps(yaml.safe_load((tools.path / "applied").read_text())) == json.dumps(manifest())


def test_the_real_thing_calls_the_tools(tools):  # noqa: F811
    for verb in ("cluster", "image", "run", "list", "logs", "delete", "unapply", "delete-cluster"):
        before = len(tools.calls)
        result = run_script("gke.sh", verb, *GIVEN, *TRAIN, tools=tools.path)
        assert result.returncode == 0, result.stderr
        assert tools.calls[before:] == dry(verb, train=TRAIN)


MISTAKES = {
    "no verb": ("", ["which of cluster", "--help"]),
    "unknown verb": ("create", ["unknown verb create", "cluster"]),
    "nothing given": ("run", ["--project (or HOVLE_PROJECT)", "--zone", "--cluster", "--name", "--image"]),
    "no bucket": ("cluster --project=p --zone=z --cluster=c --accelerator=v6e-8", ["needs --bucket (or HOVLE_BUCKET)"]),
    "unknown accelerator": ("run GIVEN --accelerator=a100-8 TRAIN", ["unknown accelerator a100-8", "v5p-128"]),
    "no topology": ("manifest GIVEN --accelerator=v5p-24 TRAIN", ["topology of v5p-24", "xpk"]),
    "no workdir": ("run GIVEN -- --config configs/instruct.py", ["--workdir /mnt/hovle/runs"]),
    "workdir elsewhere": ("apply GIVEN -- --workdir s3://b/runs", ["gs://BUCKET/runs", "--workdir /mnt/hovle/runs"]),
    "unknown option": ("logs --every", ["unknown option --every"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_anything_runs(name, tools):  # noqa: F811
    text, expected = MISTAKES[name]
    replaced = {"GIVEN": GIVEN, "TRAIN": ["--", "--workdir", "/mnt/hovle/runs"]}
    words = [word for part in text.split() for word in replaced.get(part, [part])]
    result = run_script("gke.sh", *words, tools=tools.path)
    assert result.returncode == 1 and not result.stdout and result.stderr.count("\n") == 1
    assert result.stderr.startswith("launch/gke.sh: ")
    for part in expected:
        assert part in result.stderr
    assert tools.calls == []
