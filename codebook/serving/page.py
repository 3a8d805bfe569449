"""`GET /`: a page that asks the model in a browser and draws what every method keeps of the picture."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Response

from codebook.serving.state import ModelState

FILE = Path(__file__).with_name("page.html")
"""The whole page: it loads nothing else."""
INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def content_policy(html: str) -> str:
    """The Content-Security-Policy under which a page runs its own script and style, and nothing else, from anywhere."""
    hashes = {"script": "", "style": ""}
    for kind, text in INLINE.findall(html):
        hashes[kind] += f" 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    return (
        f"default-src 'none'; script-src{hashes['script']}; style-src{hashes['style']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def router(state: ModelState) -> APIRouter:
    """The page, which has a field for an API key where the service needs one."""
    routes = APIRouter()
    html = FILE.read_text("utf-8").replace('data-key=""', 'data-key="needed"' if state.api_key else 'data-key=""', 1)
    headers = {
        "Content-Security-Policy": content_policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @routes.get("/")
    async def page() -> Response:
        return Response(html, media_type="text/html", headers=headers)

    return routes
