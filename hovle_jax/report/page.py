"""The report of a run: one self-contained HTML file."""

import dataclasses
import html
import json
import os
import pathlib
from collections.abc import Iterable

import numpy as np

from hovle_jax.report.html import data_uri, details, figure, png, section, table, write

FILE_NAME = "report.html"
BAD_SHOWN = 500


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question and the model's answer.

    Attributes:
      image: uint8 [H, W, 3], or None.
      expected: the reference answer; '' = there is none, and the answer gets no mark.
    """

    image: np.ndarray | None
    prompt: str
    answer: str
    expected: str = ""

    @property
    def right(self) -> bool | None:
        """Whether the answer is the expected one, apart from case, spaces and a full stop; None without one."""
        return plain(self.answer) == plain(self.expected) if self.expected else None


def plain(text: str) -> str:
    """An answer without what a comparison ignores: case, extra spaces and a full stop."""
    return " ".join(text.lower().split()).rstrip(".")


def write_page(
    folder: str | os.PathLike,
    title: str,
    config: dict,
    versions: dict,
    results: dict,
    samples: list[Sample],
    images: list,
    bad: Iterable = (),
    times: dict | None = None,
    *,
    mistakes: int | None = None,
    about: dict | None = None,
    chain: str = "",
) -> pathlib.Path:
    """Writes `folder/report.html`.

    Args:
      folder: the run's folder; created if absent.
      title: the heading.
      config: the resolved config, a nested dict.
      versions: what `facts.versions()` returned.
      results: {name: number, text or (text, note)}, the headline table; a nested dict becomes rows 'name.key'.
      samples: in the order to show.
      images: PNG paths, or (path, heading, caption)s, in the order to show.
      bad: `data.bad_samples.BadEvent`s of samples that could not be used.
      times: {activity: text}, where the time went.
      mistakes: how many there are among all answers; None = the samples are all answers.
      about: {name: text}, facts about the run.
      chain: the path of the chain's page, relative to this one; '' = there is none.

    Returns:
      the page's path.

    Raises:
      UserError: an image does not exist.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images = [image if isinstance(image, tuple) else (image, _heading(image), "") for image in images]
    sections = [
        section("Results", table(results, "results")),
        section(samples_heading(samples, mistakes), _samples(samples)),
        *[section(heading, figure(path, caption)) for path, heading, caption in images],
        section("Samples that could not be used", _bad_samples(bad)),
        section("The run", table(about or {}, "about")),
        section("Where the time went", table(times or {}, "times")),
        section("Config", _config(config)),
        section("Versions and machine", table(versions, "versions")),
    ]
    above = f'<p class="above"><a href="{html.escape(chain)}">All stages</a></p>\n' if chain else ""
    return write(folder / FILE_NAME, title, sections, above)


def _heading(image):
    return pathlib.Path(image).stem.replace("_", " ").capitalize()


def samples_heading(samples: list[Sample], mistakes: int | None = None) -> str:
    """'Samples: 8 of 159 mistakes, and 16 right ones': what is shown of what there is."""
    marks = [sample.right for sample in samples if sample.right is not None]
    if not marks:
        return "Samples"
    right, wrong = sum(marks), len(marks) - sum(marks)
    mistakes = wrong if mistakes is None else mistakes
    plural = "mistake" if mistakes == 1 else "mistakes"
    if not mistakes:
        shown = "no mistakes"
    elif wrong < mistakes:
        shown = f"{wrong:,} of {mistakes:,} mistakes"
    else:
        shown = f"{'all ' if mistakes > 1 else ''}{mistakes:,} {plural}"
    answers = "right one" if right == 1 else "right ones"
    return f"Samples: {shown}, and {right or 'no'} {answers}"


def _samples(samples):
    return f'<div class="samples">\n{"".join(map(_sample, samples))}</div>' if samples else ""


def _sample(sample):
    image = "" if sample.image is None else f'<img src="{data_uri(png(sample.image))}" alt="the question\'s image">'
    lines = [f'<p class="faint">{html.escape(sample.prompt)}</p>'] if sample.prompt else []
    if sample.right is None:
        lines.append(f"<p>{html.escape(sample.answer)}</p>")
    else:
        kind, mark = ("right", "&#10003;") if sample.right else ("wrong", "&#10007;")
        answer = html.escape(sample.answer) or "(empty)"
        lines.append(f'<p><span class="{kind}" title="{kind}">{mark}</span> {answer}</p>')
        if not sample.right:
            lines.append(f'<p class="faint">expected: {html.escape(sample.expected)}</p>')
    return f'<div class="sample">{image}<div>{"".join(lines)}</div></div>\n'


def _bad_samples(events):
    """Each sample once, in the order in which they were found."""
    first = {}
    for event in events:
        first.setdefault((event.source, event.shard, event.sample), event)
    if not first:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(e.reason)}</td><td>{html.escape(f'{e.shard}: {e.sample}')}</td>"
        f'<td class="faint">{html.escape(e.detail)}</td></tr>\n'
        for e in list(first.values())[:BAD_SHOWN]
    )
    more = f"<p>{len(first) - BAD_SHOWN:,} more are in bad_samples.jsonl.</p>" if len(first) > BAD_SHOWN else ""
    heading = f"{len(first):,} samples; most were replaced by another one of their source"
    return details(heading, f"<table>\n{rows}</table>{more}")


def _config(config):
    text = json.dumps(config, indent=2, default=str)
    return details("the resolved config", f"<pre>{html.escape(text)}</pre>")
