"""The building blocks of the pages. Text is escaped and images are embedded, so a page is one file."""

import base64
import html
import io
import os
import pathlib

import numpy as np

from hovle_jax.errors import UserError
from hovle_jax.report.progress import format_number
from hovle_jax.system.files import write_whole

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1f; --faint: #66666c; --paper: #fff; --panel: #f5f5f7; --rule: #dedee3;
  --right: #18794e; --wrong: #c0362c; --link: #2563a8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6ea; --faint: #9d9da6; --paper: #17171a; --panel: #222226;
  --rule: #38383e; --right: #5bc08c; --wrong: #f08379; --link: #7fb2ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1.25rem; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .6rem; }
a { color: var(--link); }
.faint { color: var(--faint); }
.above { margin: 0 0 .4rem; font-size: .875rem; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .3rem 1.5rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 400; color: var(--faint); overflow-wrap: break-word; }
td { font-variant-numeric: tabular-nums; }
.results td:not(.faint) { font-weight: 600; white-space: nowrap; }
.about th { white-space: nowrap; }
.wide { overflow-x: auto; }
.wide table { overflow-wrap: normal; }
.wide th, .wide td { white-space: nowrap; padding-right: 1.1rem; }
.tall { max-height: 40rem; overflow-y: auto; border: 1px solid var(--rule); border-radius: 6px; }
figure { margin: 0 0 1.25rem; }
figure img { display: block; height: auto; background: #fff; max-width: 100%; }
@media (max-width: 40rem) { figure img { max-width: none; width: 44rem; }
  th, td { padding-right: .9rem; } .results td.faint { font-size: .8125rem; } }
figcaption { color: var(--faint); font-size: .875rem; margin-top: .3rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .75rem; }
.sample { display: flex; gap: .9rem; padding: .8rem; background: var(--panel); border-radius: 8px; min-width: 0; }
.sample img { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated; border-radius: 4px;
  flex: none; }
.sample p { margin: 0 0 .2rem; white-space: pre-wrap; }
.sample .faint { font-size: .875rem; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
pre { background: var(--panel); padding: .8rem; border-radius: 8px; overflow-x: auto; font-size: .8125rem;
  overflow-wrap: normal; }
summary { cursor: pointer; }
"""


def write(path: pathlib.Path, title: str, sections: list[str], above: str = "") -> pathlib.Path:
    """Writes a page.

    Args:
      title: the heading.
      sections: HTML, in order; empty ones are left out.
      above: HTML before the heading.

    Returns:
      the path.
    """
    write_whole(
        path,
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Without an icon here, a browser asks the server for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{above}"
        f"<h1>{html.escape(title)}</h1>\n{''.join(sections)}</body>\n</html>\n",
    )
    return path


def section(heading: str, body: str) -> str:
    """A section of a page with its heading; '' without a body."""
    return f"<section>\n<h2>{html.escape(heading)}</h2>\n{body}\n</section>\n" if body else ""


def table(values: dict, kind: str) -> str:
    """Rows 'name, value', or 'name, value, note' for a pair (value, note); a nested dict becomes rows 'name.key'.

    Args:
      kind: the CSS class.
    """
    rows = []
    for name, value in flatten(values).items():
        value, note = value if isinstance(value, tuple) else (value, "")
        noted = f'<td class="faint">{html.escape(note)}</td>' if note else ""
        rows.append(f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(text_of(value))}</td>{noted}</tr>\n")
    return f'<table class="{kind}">\n{"".join(rows)}</table>' if rows else ""


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A table of HTML cells with a heading for each column; it scrolls on a narrower screen."""
    cells = lambda tag, row: "".join(f"<{tag}>{cell}</{tag}>" for cell in row)
    body = "".join(f"<tr>{cells('td', row)}</tr>\n" for row in rows)
    heading = cells("th", map(html.escape, head))
    return f'<div class="wide"><table>\n<tr>{heading}</tr>\n{body}</table></div>'


def figure(path: str | os.PathLike, caption: str = "") -> str:
    """An image file, embedded; a tall one scrolls. Raises UserError where it does not exist."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"the report's image {path} does not exist")
    what = html.escape(caption or path.stem.replace("_", " "))
    image = f'<div class="wide tall"><img src="{data_uri(path.read_bytes())}" alt="{what}"></div>'
    below = f"<figcaption>{what}</figcaption>" if caption else ""
    return f"<figure>{image}{below}</figure>\n"


def details(summary: str, body: str) -> str:
    """A summary line that unfolds to the body."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def text_of(value: object) -> str:
    """A value as text; numbers as a person reads them."""
    if isinstance(value, (float, np.floating)):
        return format_number(float(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def flatten(values: dict, prefix: str = "") -> dict:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a PNG file's bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def data_uri(content: bytes) -> str:
    """A data: URI that contains a PNG file's bytes."""
    return "data:image/png;base64," + base64.b64encode(content).decode()
