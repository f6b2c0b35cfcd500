"""The model that lmms-eval runs in its own process; what lmms-eval itself does with it, where it is installed."""

import importlib
import json
import re
import subprocess
import sys
import types

import pytest
from PIL import Image

from hovle_jax.checkpoints import save_model
from hovle_jax.errors import UserError
from hovle_jax.inference.generate import Prompt, answer
from hovle_jax.inference.load import load_run
from hovle_jax.serving import lmms_eval_model, lmms_eval_plugin
from hovle_jax.serving.lmms_eval_model import Answers
from tests import micro
from tests.launch_tools import ROOT

pytestmark = pytest.mark.usefixtures("quick_compilation")

NEW = 6
OPTIONS = {"max_new_tokens": NEW, "temperature": 0.0, "top_p": 0, "num_beams": 1, "do_sample": False, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("plugin")
    config = micro.run_config("instruct")
    params = micro.params(config)
    save_model(made / "run", config.model_config.only(("embedding", "llm")), {c: lambda c=c: params[c] for c in params})
    micro.tokenizer().save(made / "run")
    return made / "run"


@pytest.fixture(scope="module")
def model(folder):
    return Answers(pretrained=str(folder), length=256)


def picture(number):
    return Image.fromarray(micro.examples()[number].image)


def messages_of(row):
    """As lmms-eval's tasks make them of a row: images first, each under `url`."""
    images = [{"type": "image", "url": image} for image in row["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": row["question"]}]}]


def asked(model, rows, options=OPTIONS):
    """The answers to rows, by requests of lmms-eval 0.7's form."""
    model.task_dict = {"shapes": {"test": rows}}
    return model.generate_until(
        [
            types.SimpleNamespace(args=("the context", messages_of, dict(options), number, "shapes", "test"))
            for number in range(len(rows))
        ]
    )


def plain(folder, *prompts):
    """The answers of the batched greedy program."""
    return answer(load_run(folder).answerer, [Prompt.of(*prompt) for prompt in prompts], NEW)


def test_answers_are_those_of_the_plain_program_in_order(folder, model):
    images = [picture(number) for number in range(4)]
    rows = [{"images": [image], "question": f"what is it {i}?"} for i, image in enumerate(images)]
    rows.append({"images": images[:2], "question": "are they alike?"})
    rows.append({"images": [], "question": "hello"})
    rows += rows[:1] * (2 * model._model.engine.num_slots)  # more than wait at once
    wanted = plain(folder, *[(row["question"], *row["images"]) for row in rows[:6]])
    assert len(set(wanted)) > 2
    assert asked(model, rows) == wanted + wanted[:1] * (len(rows) - 6)


def test_other_modes_of_images_are_seen_as_files_of_them_are(folder, model, tmp_path):
    clear = picture(3).convert("RGBA")
    clear.save(tmp_path / "a.png")
    rows = [{"images": [image], "question": "what is it?"} for image in (clear, str(tmp_path / "a.png"))]
    assert asked(model, rows) == plain(folder, ("what is it?", picture(3))) * 2


def test_generation_kwargs_are_honoured(model):
    row = {"images": [picture(3)], "question": "what is it?"}
    (whole,) = asked(model, [row], {"max_new_tokens": 12})
    stop = whole[3:5]
    assert asked(model, [row], {"max_new_tokens": 12, "until": [stop, "\n\n"]}) == [whole[: whole.index(stop)]]
    assert asked(model, [row], {"max_new_tokens": 12, "until": stop}) == [whole[: whole.index(stop)]]
    drawn = {"max_new_tokens": 12, "temperature": 3.0}
    first, again, other = (asked(model, [row], drawn | {"seed": seed}) for seed in (1, 1, 2))
    assert first == again != other and first != [whole]
    assert asked(model, [row], drawn | {"do_sample": False}) == [whole]
    # More than the model can still write after the prompt: as much as it can.
    (long,) = asked(model, [row], {"max_new_tokens": 49152, "image_aspect_ratio": "original"})
    assert long.startswith(whole)


def test_the_stop_that_lmms_eval_injects_cuts_nothing():
    fields = lmms_eval_model._fields({"until": ["\n\n", "Q:"]})
    assert fields["stop"] == ["Q:"] and fields["max_tokens"] == lmms_eval_model.NEW_TOKENS


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"length_penalty": 2.0}, {"temperature": -1.0}], ids=str)
def test_what_cannot_be_honoured_is_refused_by_name_before_anything_is_asked(model, options):
    rows = [{"images": [], "question": "hello"}]
    with pytest.raises(UserError, match=next(iter(options))):
        asked(model, rows, OPTIONS | options | {"do_sample": True})
    assert not model._model.engine.step()  # nothing is left


def test_a_question_that_cannot_be_read_has_an_empty_answer_and_is_told(folder, model, capsys):
    rows = [{"images": [], "question": question} for question in ("hello", "hello " * 400, "what?")]
    answers = asked(model, rows)
    assert answers[1] == "" and [answers[0], answers[2]] == plain(folder, ("hello",), ("what?",))
    told = capsys.readouterr().err
    assert "1 of 3 questions could not be asked" in told and "shapes row 1: the prompt has" in told


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_what_is_no_image_is_not_dropped(model, capsys, kind):
    model.task_dict = {"films": {"test": [None]}}
    content = [{"type": kind, "url": "a"}, {"type": "text", "text": "what is it?"}]
    request = types.SimpleNamespace(
        args=("", lambda row: [{"role": "user", "content": content}], OPTIONS, 0, "films", "test")
    )
    assert model.generate_until([request]) == [""]
    assert f"type '{kind}' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, said", [
    ({}, "pretrained=runs/instruct"),
    ({"pretrained": "x", "max_tile": 3}, "unknown max_tile; known are pretrained"),
    ({"pretrained": "x", "device": "cuda:0"}, "--device cuda:0"),
    ({"pretrained": "x", "batch_size": "auto"}, "--batch_size auto"),
    ({"pretrained": "nowhere/at/all"}, "nowhere/at/all"),
])  # fmt: skip
def test_arguments_that_mean_nothing_are_refused(arguments, said):
    with pytest.raises(UserError, match=re.escape(said)):
        Answers(**arguments)


def test_kinds_of_requests_that_are_not_offered_are_refused_by_name(model):
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(UserError, match=f"no {name}: .*generate_until"):
            getattr(model, name)([])


def test_setup_names_the_function_that_makes_the_manifest():
    name, module, function = re.search(
        r'"lmms_eval.models": \["(\w+)=([\w.]+):(\w+)"\]', (ROOT / "setup.py").read_text()
    ).groups()
    assert name == lmms_eval_plugin.NAME
    assert getattr(importlib.import_module(module), function) is lmms_eval_plugin.manifest


def test_lmms_evals_other_models_do_not_wait_for_jax():
    program = f"import sys, {lmms_eval_plugin.__name__}; print({{'jax', 'numpy'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


# ---------------------------------------------------------------------------------------------------------------------
# With lmms-eval itself: pip install lmms-eval==0.7.3 "filelock<4"

TASK = """
task: shapes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function shapes.images
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 6
  temperature: 0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
IMAGES = """
def images(row):
    from PIL import Image

    return [Image.open(row["path"])]
"""


def test_lmms_eval_finds_the_model_and_scores_it(folder, tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models.registry_v2 import ModelRegistryV2
    from lmms_eval.tasks import TaskManager

    registry = ModelRegistryV2()
    registry.register_manifest(lmms_eval_plugin.manifest())
    made = registry.get_model_class("hovle_jax")  # checks the base class and that it takes messages
    rows = []
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
        rows.append({"path": str(tmp_path / f"{number}.png"), "question": "what is it?"})
    wanted = plain(folder, *[("what is it?", picture(number)) for number in range(3)])
    rows = [row | {"answer": text if i else "wrong"} for i, (row, text) in enumerate(zip(rows, wanted))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "shapes.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    (tmp_path / "shapes.py").write_text(IMAGES)
    model = made.create_from_arg_string(f"pretrained={folder},length=256", {"batch_size": 1, "device": None})
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False, model_name="hovle_jax")
    results = simple_evaluate(model, tasks=["shapes"], task_manager=tasks, log_samples=True)
    assert [sample["filtered_resps"] for sample in results["samples"]["shapes"]] == [[text] for text in wanted]
    assert results["results"]["shapes"]["exact_match,none"] == pytest.approx(2 / 3)
