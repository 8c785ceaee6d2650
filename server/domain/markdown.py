"""Renders Markdown to safe HTML. The renderer pulldown-cmark (CommonMark) takes linear time. nh3 (ammonia) then removes
all elements but the ones listed here, whatever the renderer returns.

Both release the interpreter's lock. So a thread can render long messages while the loop serves others.
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
"""Max characters of the HTML before cleaning, which takes longer than rendering."""
MAX_DEPTH = 20
"""Max depth of elements. A list is two deep, with its `ul` and its `li`."""
MAX_INLINE = 1_000
"""Max characters of a message that is rendered on the loop, which takes less time than the use of a thread."""

TURN_SECONDS = 10.0
"""Max wait of a long message for others of its user, in seconds. A longer wait is refused as an outage of the database
is.
"""

_thread = ThreadPoolExecutor(1, thread_name_prefix="markdown")
_turns: Turns[UserId] = Turns(1, patience=TURN_SECONDS)

# Unsupported markup is replaced by private-use characters before rendering, and shown as text.
_LESS, _AND, _NOTHING = "\ue0f0", "\ue0f1", "\ue0f2"
_ESCAPED = {"\\\\": "\0b", "\\<": "\0l", "\\&": "\0a", "\\\n": "\0n"}
"""Substitutes for escaped characters. Pairs of backslashes come first, because the second one escapes nothing."""
_OURS = re.compile(f"[\0{_LESS}{_AND}{_NOTHING}]")
_IMAGE_OR_HEADING = re.compile(r"(?<=!)(?=\[)|^(?= {0,3}(?:#{1,6}[ \t\r\n]|=+[ \t]*$|\[[^\]\n]+\]:))", re.MULTILINE)
_REVEALED = {_LESS: "&lt;", _AND: "&amp;", "%EE%83%B0": "%3C", "%EE%83%B1": "&amp;", "%EE%83%B2": "", _NOTHING: ""}
_HEADING = re.compile(r"<(/?)h[1-6]>")
_TAG = re.compile(r"<(/?)(\w+)")
_SINGLE = {"br", "hr"}


async def rendered(content: str, user_id: UserId) -> str:
    """Return the result of `render` for a message of a user, without blocking the loop. Raises Refused as `render`
    does.

    Each connection waits for its message, so frames keep their order. Each user has at most one message in the queue of
    the thread. Otherwise a user with many connections would delay others by as many messages.
    """
    if len(content) <= MAX_INLINE:
        return render(content)
    await _turns.take(user_id)
    try:
        return await asyncio.get_running_loop().run_in_executor(_thread, render, content)
    finally:
        _turns.give(user_id)


def render(content: str) -> str:
    """Return the HTML of a message in Markdown. Raises Refused if it is too long or too deep."""
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
    """Return Markdown without the markup that messages do not support. Line breaks become hard breaks.

    Each step is a `str.replace`. A regular expression with groups took ten times as long as the renderer.
    """
    hidden = _OURS.sub("\ufffd", content).replace("\r\n", "\n").replace("\r", "\n")
    for escaped, stands_in in _ESCAPED.items():
        hidden = hidden.replace(escaped, stands_in)
    hidden = hidden.replace("<", _LESS).replace(f"{_LESS}http://", "<http://").replace(f"{_LESS}https://", "<https://")
    hidden = hidden.replace("&", _AND)
    # Two spaces before a line break make it a hard break. In code they are removed afterwards.
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
