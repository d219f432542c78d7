"""Write the viewer's page: one HTML file with its style, its script and, unless it is served, its data.

The page trusts nothing that it shows, because its texts come from models and tools. Three walls stand behind each
other. Data are embedded as JSON in which no `<` is left, so no text can end the block. The script puts text into the
page only as text. The page's own content policy lets the browser run only that one script, load nothing, and refuse
every string that would be parsed as markup (trusted types).
"""

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from html import escape
from importlib.resources import files

from trace_async.printable import printable
from trace_async.types import Json

SCRIPTS = ("data.js", "layout.js", "drawing.js", "list.js", "detail.js", "curves.js", "app.js")
"""They are joined in this order into one script."""


def viewer_page(title: str, data: Mapping[str, Json] | None) -> str:
    """Return the page with `data` embedded. With None it asks the server that it came from for the data."""
    script = '"use strict";\n(() => {\n' + "".join(_asset(name) for name in SCRIPTS) + "})();\n"
    style = _asset("style.css")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "connect-src 'none'" if data is not None else "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
        )
    )
    parts = {
        "{{policy}}": escape(policy),
        "{{title}}": escape(printable(title)),
        "{{style}}": style,
        "{{data}}": embedded(data) if data is not None else "null",
        "{{script}}": script,
    }
    # One pass over the template: what is put in is never searched for further marks.
    return re.sub(r"\{\{\w+\}\}", lambda mark: parts[mark[0]], _asset("page.html"))


def embedded(data: Mapping[str, Json]) -> str:
    """Return `data` as JSON that may stand inside a script element: only ASCII, and nothing that HTML reads."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return files("trace_async.trees.viewer").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
