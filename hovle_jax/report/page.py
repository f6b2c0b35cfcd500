"""The report of a run: one HTML page that needs nothing but its own folder."""

import base64
import dataclasses
import html
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import urllib.parse

import numpy as np

import hovle_jax
from hovle_jax.errors import UserError
from hovle_jax.report.progress import format_number

FILE_NAME = "report.html"
BAD_SHOWN = 500
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1f; --faint: #66666c; --paper: #fff; --panel: #f5f5f7; --rule: #dedee3;
  --right: #18794e; --wrong: #c0362c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6ea; --faint: #9d9da6; --paper: #17171a; --panel: #222226;
  --rule: #38383e; --right: #5bc08c; --wrong: #f08379; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1.25rem; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .6rem; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .3rem 1.5rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 400; color: var(--faint); }
td { font-variant-numeric: tabular-nums; }
td.faint { color: var(--faint); }
.results td { font-weight: 600; }
figure { margin: 0 0 1.25rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px;
  border: 1px solid var(--rule); }
figcaption { color: var(--faint); font-size: .875rem; margin-top: .3rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .75rem; }
.sample { display: flex; gap: .9rem; padding: .8rem; background: var(--panel); border-radius: 8px; min-width: 0; }
.sample img { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated; border-radius: 4px;
  flex: none; }
.sample p { margin: 0 0 .2rem; white-space: pre-wrap; }
.sample .faint { color: var(--faint); font-size: .875rem; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
pre { background: var(--panel); padding: .8rem; border-radius: 8px; overflow-x: auto; font-size: .8125rem;
  overflow-wrap: normal; }
summary { cursor: pointer; }
"""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question and what the model made of it.

    Attributes:
      image: uint8 [H, W, 3], or None.
      expected: the reference answer; empty = there is none, and the answer gets no mark.
    """

    image: np.ndarray | None
    prompt: str
    answer: str
    expected: str = ""

    @property
    def right(self):
        """Whether the answer is the expected one but for case, blanks and a full stop; None without one."""
        plain = lambda text: " ".join(text.lower().split()).rstrip(".")
        return plain(self.answer) == plain(self.expected) if self.expected else None


def versions():
    """{name: value} of the software and the machine; starts JAX's backend."""
    import jax

    devices = jax.devices()
    facts = {"python": platform.python_version(), "hovle_jax": hovle_jax.__version__}
    facts |= {name: _package_version(name) for name in PACKAGES}
    return facts | {
        "platform": platform.platform(),
        "device": devices[0].device_kind,
        "device_count": len(devices),
        "cpu_count": os.cpu_count(),
    }


def write_page(folder, title, config, versions, results, samples, pictures, bad=(), times=None):
    """Writes `folder/report.html`.

    Args:
      folder: the run's folder; made if absent.
      title: the heading.
      config: the resolved config, a nested dict.
      versions: what `versions()` returned.
      results: {name: number or text}, the headline table; a dict in it becomes rows 'name.key'.
      samples: [Sample], in the order to show.
      pictures: PNG paths, in the order to show; one inside `folder` is referred to, another is put into the page.
      bad: `data.bad.BadEvent`s of samples that could not be used.
      times: {activity: text}, where the time went.

    Returns:
      the page's path.

    Raises:
      UserError: a picture that does not exist.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections = [
        _section("Results", _table(_flatten(results), "results")) if results else "",
        _section("Pictures", "".join(_figure(path, folder) for path in pictures)) if pictures else "",
        _section(_samples_heading(samples), _samples(samples)) if samples else "",
        _section("Samples that could not be used", _bad_samples(bad)) if bad else "",
        _section("Where the time went", _table(times, "times")) if times else "",
        _section("Config", _config(config)),
        _section("Versions and machine", _table(versions, "versions")),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Without an icon of its own, a browser asks the server for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{''.join(sections)}</body>\n</html>\n"
    )
    path = folder / FILE_NAME
    path.write_text(page, encoding="utf-8")
    return path


def _section(heading, body):
    return f"<section>\n<h2>{html.escape(heading)}</h2>\n{body}\n</section>\n"


def _table(values, kind):
    rows = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(_text(value))}</td></tr>\n"
        for name, value in values.items()
    )
    return f'<table class="{kind}">\n{rows}</table>'


def _text(value):
    if isinstance(value, (float, np.floating)):
        return format_number(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _flatten(values, prefix=""):
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _figure(path, folder):
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"the report's picture {path} does not exist")
    if path.resolve().is_relative_to(folder.resolve()):
        source = urllib.parse.quote(path.resolve().relative_to(folder.resolve()).as_posix())
    else:
        source = _data_uri(path.read_bytes())
    caption = html.escape(path.stem.replace("_", " "))
    # The link opens it at full size: on a phone its text is small.
    link = f'<a href="{source}">' if not source.startswith("data:") else "<a>"
    return f'<figure>{link}<img src="{source}" alt="{caption}"></a><figcaption>{caption}</figcaption></figure>\n'


def _samples_heading(samples):
    marks = [sample.right for sample in samples if sample.right is not None]
    return f"Samples ({sum(marks)} of {len(marks)} right)" if marks else "Samples"


def _samples(samples):
    return f'<div class="samples">\n{"".join(map(_sample, samples))}</div>'


def _sample(sample):
    image = "" if sample.image is None else f'<img src="{_data_uri(_png(sample.image))}" alt="the question\'s image">'
    lines = [f'<p class="faint">{html.escape(sample.prompt)}</p>']
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
    """Each once, in the order in which they were found."""
    first = {}
    for event in events:
        first.setdefault((event.source, event.shard, event.sample), event)
    rows = "".join(
        f"<tr><td>{html.escape(e.reason)}</td><td>{html.escape(f'{e.shard}: {e.sample}')}</td>"
        f'<td class="faint">{html.escape(e.detail)}</td></tr>\n'
        for e in list(first.values())[:BAD_SHOWN]
    )
    more = f"<p>{len(first) - BAD_SHOWN:,} more are in bad_samples.jsonl.</p>" if len(first) > BAD_SHOWN else ""
    return (
        f"<details><summary>{len(first):,} samples, most of which another one of their source replaced</summary>"
        f"<table>\n{rows}</table>{more}</details>"
    )


def _config(config):
    text = json.dumps(config, indent=2, default=str)
    return f"<details><summary>the resolved config</summary><pre>{html.escape(text)}</pre></details>"


def _png(image):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def _data_uri(png):
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _package_version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
