"""The chat page at /: files of this package, written for it, which ask nothing of any other server."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response

FOLDER = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
PAGE = {"/" + file.name.removeprefix("index.html"): file for file in FOLDER.iterdir() if file.suffix in TYPES}
HEADERS = {
    # What a model writes is a stranger's text: should it ever become markup, it can neither run nor load anything.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """A path for each file. They are read once: a server in use does not change when it is installed anew."""
    for path, file in PAGE.items():
        app.add_api_route(path, sender(file), methods=["GET"], response_class=Response)


def sender(file: Path):
    content, kind = file.read_bytes(), TYPES[file.suffix] + "; charset=utf-8"

    async def send() -> Response:
        return Response(content, headers={**HEADERS, "Content-Type": kind})

    return send
