"""The page to ask from: three files, which load nothing from elsewhere."""

import html
import importlib.resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.routing import Route

FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PATHS = tuple(FILES)
# Scripts, styles and requests of this server alone; images that the page itself holds. What a model says is never code.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes(model: str, length: int) -> "list[Route]":
    """A route for each of the page's files.

    Args:
      model: the name that the page shows and asks for.
      length: the most tokens of a prompt with its answer; a quarter is the longest answer that the page asks for, so
        that a conversation has room.
    """
    from starlette.responses import Response
    from starlette.routing import Route

    known = {"model": html.escape(model), "max_tokens": str(max(1, length // 4))}
    folder = importlib.resources.files("hovle_jax.serving")

    def route(path, name, kind):
        text = folder.joinpath(name).read_text("utf-8")
        for key, value in known.items():
            text = text.replace("{{" + key + "}}", value)

        async def send(request):
            return Response(text, media_type=kind, headers=HEADERS)

        return Route(path, send)

    return [route(path, name, kind) for path, (name, kind) in FILES.items()]
