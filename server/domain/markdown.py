"""Markdown to HTML that is safe to show: pulldown-cmark (CommonMark) renders it in time linear to its length, and nh3
(ammonia) lets through nothing but the elements named here, whatever the renderer makes.

Both release the interpreter's lock, so that long messages are rendered in a thread while the loop serves others.
"""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor

import nh3
import pyromark

from protocol.errors import ErrorCode, Refused
from protocol.ids import UserId
from protocol.limits import MAX_FORMATTED
from server.fairness.turns import Turns

ELEMENTS = {"p", "br", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li", "a", "hr"}
ATTRIBUTES: dict[str, set[str]] = {"*": set(), "a": {"href"}, "ol": {"start"}}
SCHEMES = {"http", "https", "mailto"}
MAX_RAW = 20_000
"""Max characters of HTML before it is cleaned, which takes longer than rendering."""
MAX_DEPTH = 20
"""Max depth of elements: a list is two, its `ul` and its `li`."""
MAX_INLINE = 1_000
"""Max characters that are rendered on the loop: they take less time than the way to a thread and back."""

TURN_SECONDS = 10.0
"""Max seconds that a long message waits for others of the same user. The refusal is that of a database that is away."""

_thread = ThreadPoolExecutor(1, thread_name_prefix="markdown")
_turns: Turns[UserId] = Turns(1, patience=TURN_SECONDS)

# Markup that messages do not have is hidden from the renderer behind characters for private use, and shown as text.
_LESS, _AND, _NOTHING = "\ue0f0", "\ue0f1", "\ue0f2"
_ESCAPED = {"\\\\": "\0b", "\\<": "\0l", "\\&": "\0a", "\\\n": "\0n"}
"""Stand-ins for what a backslash escapes. Pairs of backslashes come first, since they escape nothing after them."""
_OURS = re.compile(f"[\0{_LESS}{_AND}{_NOTHING}]")
_IMAGE_OR_HEADING = re.compile(r"(?<=!)(?=\[)|^(?= {0,3}(?:#{1,6}[ \t\r\n]|=+[ \t]*$|\[[^\]\n]+\]:))", re.MULTILINE)
_REVEALED = {_LESS: "&lt;", _AND: "&amp;", "%EE%83%B0": "%3C", "%EE%83%B1": "&amp;", "%EE%83%B2": "", _NOTHING: ""}
_HEADING = re.compile(r"<(/?)h[1-6]>")
_TAG = re.compile(r"<(/?)(\w+)")
_SINGLE = {"br", "hr"}


async def rendered(content: str, user_id: UserId) -> str:
    """Return what `render` does for a message of a user, without holding up the loop. Raises Refused as `render` does.

    Each connection waits for its message, so frames keep their order. In the queue of the thread each user has one
    message: with many connections, a user would have others wait for all of theirs.
    """
    if len(content) <= MAX_INLINE:
        return render(content)
    await _turns.take(user_id)
    try:
        return await asyncio.get_running_loop().run_in_executor(_thread, render, content)
    finally:
        _turns.give(user_id)


def render(content: str) -> str:
    """Return the HTML of a message in Markdown. Raises Refused if that is too long, or nested too deeply."""
    raw = pyromark.html(_hidden(content), options=pyromark.Options.ENABLE_STRIKETHROUGH)
    raw = _HEADING.sub(r"<\1p>", raw.replace("  \n", "\n").replace("<del>", "<s>").replace("</del>", "</s>"))
    for stands_in, shown in _REVEALED.items():
        raw = raw.replace(stands_in, shown)
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
        raise Refused(
            ErrorCode.INVALID,
            f"`content` nests quotes and lists more than {MAX_DEPTH} levels deep. Use fewer levels.",
            path="content",
        )
    return html


def _hidden(content: str) -> str:
    """Return Markdown in which only markup that messages have is markup, and line breaks are seen.

    Each step is a `str.replace`: a pattern that copies groups took ten times as long as the renderer.
    """
    hidden = _OURS.sub("\ufffd", content).replace("\r\n", "\n").replace("\r", "\n")
    for escaped, stands_in in _ESCAPED.items():
        hidden = hidden.replace(escaped, stands_in)
    hidden = hidden.replace("<", _LESS).replace(f"{_LESS}http://", "<http://").replace(f"{_LESS}https://", "<https://")
    hidden = hidden.replace("&", _AND)
    # Two spaces before a line break make it one that is seen; in code, they are taken away again.
    hidden = hidden.replace("\n", "  \n")
    for escaped, stands_in in _ESCAPED.items():
        hidden = hidden.replace(stands_in, escaped)
    return _IMAGE_OR_HEADING.sub(_NOTHING, hidden)


def _depth(html: str) -> int:
    deepest = depth = 0
    for closing, name in _TAG.findall(html):
        if name not in _SINGLE:
            depth += -1 if closing else 1
            deepest = max(deepest, depth)
    return deepest


def _too_long() -> Refused:
    return Refused(
        ErrorCode.INVALID, f"`content` is longer than {MAX_FORMATTED} characters as HTML. Shorten it.", path="content"
    )
