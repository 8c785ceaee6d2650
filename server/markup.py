"""Markdown to HTML that is safe to show: pulldown-cmark (CommonMark) renders it in time linear to its length, and nh3
(ammonia) lets through nothing but the elements named here, whatever the renderer makes.

Rendering must be cheap, because it runs on the loop: a pure Python renderer took up to 250 ms for a message.
"""

import re

import nh3
import pyromark

from protocol.errors import ErrorCode, Refused
from protocol.limits import MAX_FORMATTED

ELEMENTS = {"p", "br", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li", "a", "hr"}
ATTRIBUTES: dict[str, set[str]] = {"*": set(), "a": {"href"}, "ol": {"start"}}
SCHEMES = {"http", "https", "mailto"}
MAX_RAW = 20_000
"""Max characters of HTML before it is cleaned, which takes longer than rendering."""
MAX_DEPTH = 20
"""Max depth of elements: a list is two, its `ul` and its `li`."""

# Markup that messages do not have is hidden from the renderer behind characters for private use, and shown as text.
_LESS, _AND, _NOTHING = "\ue0f0", "\ue0f1", "\ue0f2"
_OURS = re.compile(f"[{_LESS}{_AND}{_NOTHING}]")
# A backslash escapes what follows it, also another backslash: an even number of them escapes nothing.
_UNESCAPED = r"(?<!\\)((?:\\\\)*)"
_HTML = re.compile(_UNESCAPED + r"<(?!https?://)")
_ENTITY = re.compile(_UNESCAPED + "&")
_BREAK = re.compile(_UNESCAPED + r"\n")
_IMAGE_OR_HEADING = re.compile(r"(?<=!)(?=\[)|^(?= {0,3}(?:#{1,6}[ \t\r\n]|=+[ \t]*$|\[[^\]\n]+\]:))", re.MULTILINE)
_REVEALED = {_LESS: "&lt;", _AND: "&amp;", _NOTHING: "", "%EE%83%B0": "%3C", "%EE%83%B1": "&amp;", "%EE%83%B2": ""}
_HIDDEN = re.compile("|".join(_REVEALED))
_HEADING = re.compile(r"<(/?)h[1-6]>")
_TAG = re.compile(r"<(/?)(\w+)")
_SINGLE = {"br", "hr"}


def render(content: str) -> str:
    """Return the HTML of a message in Markdown. Raises Refused if that is too long, or nested too deeply."""
    hidden = _OURS.sub("\ufffd", content).replace("\r\n", "\n").replace("\r", "\n")
    hidden = _ENTITY.sub(rf"\1{_AND}", _HTML.sub(rf"\1{_LESS}", hidden))
    hidden = _IMAGE_OR_HEADING.sub(_NOTHING, hidden)
    # Two spaces before a line break make it one that is seen; in code, they are taken away again.
    raw = pyromark.html(_BREAK.sub(r"\1  \n", hidden), options=pyromark.Options.ENABLE_STRIKETHROUGH)
    raw = _HEADING.sub(r"<\1p>", raw.replace("  \n", "\n").replace("<del>", "<s>").replace("</del>", "</s>"))
    raw = _HIDDEN.sub(lambda found: _REVEALED[found[0]], raw)
    if len(raw) > MAX_RAW:
        raise _too_long()
    html = nh3.clean(
        raw,
        tags=ELEMENTS,
        attributes=ATTRIBUTES,
        url_schemes=SCHEMES,
        url_relative="deny",
        link_rel="noopener noreferrer nofollow",
    ).strip()
    if len(html) > MAX_FORMATTED:
        raise _too_long()
    if _depth(html) > MAX_DEPTH:
        raise Refused(ErrorCode.INVALID, "Quotes and lists are nested too deeply.", path="content")
    return html


def _depth(html: str) -> int:
    deepest = depth = 0
    for closing, name in _TAG.findall(html):
        if name not in _SINGLE:
            depth += -1 if closing else 1
            deepest = max(deepest, depth)
    return deepest


def _too_long() -> Refused:
    return Refused(ErrorCode.INVALID, f"As HTML this would be longer than {MAX_FORMATTED} characters.", path="content")
