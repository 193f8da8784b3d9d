"""A trace as one page for a browser: everything inside it, nothing fetched, and nothing in it run but its own script.

Numbers travel as little-endian arrays, deflated, in base64; attention weights as bytes (`models.trace.quantise`). Text of tokens is data
alone: the JSON is written so that no text of it can end its element, and the script puts it on the page as text. The policy in the
page's head lets one style and one script run, by their hashes, and forbids every connection.
"""

import base64
import hashlib
import html
import json
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..kernels.errors import ToyllmError
from ..models.params import sizes
from ..models.whole import whole_file
from . import output

if TYPE_CHECKING:
    from ..models.model import Model
    from ..models.tokenizer import Tokenizer
    from ..models.trace import Trace

PAGE = Path(__file__).with_name("trace_page.html")
PARTS = ("trace_page.css", "trace_page_tools.js", "trace_page.js")
NO_MAPS = "The attention maps of this trace are too large for a page: trace a shorter prompt, or fewer layers with --layers."
TOKENS = 2048  # the most a page holds: what a browser lays out without delay


def write_page(path: Path, force: bool, loaded: "Model", found: "Trace") -> None:
    """Write the page to a file, whole or not at all, and say so."""
    text = page(loaded, found).encode()
    with whole_file(path, force) as file:
        file.write(text)
    output.say(f"wrote {output.one_line(str(path))}: {len(text):,} bytes, {len(found.ids)} tokens, {len(found.layers)} layers")


def check_length(T: int) -> None:
    """Raise ToyllmError for more tokens than a page holds."""
    if T > TOKENS:
        raise ToyllmError(f"--html: {T} tokens: a page holds up to {TOKENS}; trace a part of the text, or take --json")


def page(loaded: "Model", found: "Trace") -> str:
    """The HTML of the page."""
    style, tools, script = (PAGE.with_name(name).read_text(encoding="utf-8") for name in PARTS)
    script = tools + script
    rules = ("default-src 'none'", f"style-src '{digest(style)}'", f"script-src '{digest(script)}'")
    parts = {
        "policy": "; ".join((*rules, "img-src data:", "base-uri 'none'", "form-action 'none'")),
        "generator": f"toyllm {__version__}",
        "title": html.escape(f"trace of {loaded.files.name}, {len(found.ids)} tokens"),
        "style": style,
        "script": script,
        "data": embedded(content(loaded, found)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], PAGE.read_text(encoding="utf-8"))


def digest(text: str) -> str:
    """What a content security policy calls a text that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded(document: dict[str, Any]) -> str:
    """JSON that stands in a script element: without a character that HTML, or a terminal that shows the file, could take for more."""
    return re.sub("[<>&\x7f]", lambda match: f"\\u{ord(match[0]):04x}", json.dumps(document, allow_nan=False))


def packed(array: np.ndarray, dtype: str) -> dict[str, str]:
    """An array as the script unpacks it."""
    data = zlib.compress(np.ascontiguousarray(array, f"<{dtype}").tobytes(), 6)
    return {"type": dtype, "packed": base64.b64encode(data).decode()}


def content(loaded: "Model", found: "Trace") -> dict[str, Any]:
    """What the script shows: figures by layer and token, and the text of every token that occurs."""
    s, layers, T = sizes(loaded.config), found.layers, len(found.ids)

    def stacked(dtype: str, parts: list[Any]) -> dict[str, str]:
        return packed(np.stack(parts), dtype)

    arrays = {
        "embed": packed(found.embed, "f4"),
        "mid": stacked("f4", [layer.resid_mid for layer in layers]),
        "out": stacked("f4", [layer.out for layer in layers]),
        "entropy": stacked("f4", [layer.entropy for layer in layers]),
        "lensIds": stacked("i4", [layer.lens.ids for layer in layers]),
        "lensProbs": stacked("f4", [layer.lens.probabilities for layer in layers]),
        "lensEntropy": stacked("f4", [layer.lens.entropy for layer in layers]),
        "next": stacked("f4", [layer.lens.following for layer in layers]),
        "rank": stacked("i4", [layer.lens.rank for layer in layers]),
    }
    if sinks := [layer.sink for layer in layers if layer.sink is not None]:
        arrays["sink"] = stacked("f4", sinks)
    if routed := [layer.routing for layer in layers if layer.routing]:
        arrays["experts"] = stacked("i4", [routing.experts for routing in routed])
        arrays["weights"] = stacked("f4", [routing.weights for routing in routed])
        arrays["counts"] = stacked("i4", [routing.counts for routing in routed])
    maps = [packed(layer.maps, "u1") for layer in layers if layer.maps is not None]
    known = {*found.ids, *(int(i) for layer in layers for i in np.unique(layer.lens.ids) if i >= 0)}
    experts = f", {s.E} experts, {s.k} a token" if s.E else ""
    return {
        "model": loaded.files.name,
        "facts": f"{T:,} tokens through {s.L} layers of {s.H} heads{experts}",
        "notices": [*changed(loaded), *([] if maps else [NO_MAPS])],
        "ids": found.ids,
        "pieces": {str(i): piece(loaded.tokenizer, i) for i in sorted(known)} if loaded.tokenizer else {},
        "layers": [layer.number for layer in layers],
        "heads": s.H,
        "experts": s.E,
        "chosen": s.k,
        "top": layers[0].lens.ids.shape[1],
        "arrays": arrays,
        "maps": maps or None,
    }


def changed(loaded: "Model") -> list[str]:
    """What was changed as the model ran, in a sentence, if anything was."""
    made = loaded.changes.made if loaded.changes else ()
    return [output.one_line(f"Changed as it ran: {', '.join(map(str, made))}.")] if made else []


def piece(tokenizer: "Tokenizer", token: int) -> str:
    """The text of a token as a page can show it: spaces and line breaks as they are, bytes of no character in hexadecimal."""
    data = tokenizer.token_bytes(token)
    try:
        return output.printable(data.decode("utf-8"))
    except UnicodeDecodeError:
        return "".join(chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in data)
