"""Markdown to HTML that is safe to show: markdown-it-py (CommonMark) renders it without HTML of the sender's, and nh3
(ammonia) lets through nothing but the elements named here, whatever the renderer makes.
"""

import nh3
from markdown_it import MarkdownIt

from protocol.errors import ErrorCode, Refused
from protocol.limits import MAX_FORMATTED

ELEMENTS = {"p", "br", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li", "a", "hr"}
ATTRIBUTES: dict[str, set[str]] = {"*": set(), "a": {"href"}, "ol": {"start"}}
SCHEMES = {"http", "https", "mailto"}
MAX_DEPTH = 10
"""How deep quotes and lists are nested; the rest is plain text."""

_markdown = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": MAX_DEPTH}).enable("strikethrough")
_markdown.disable(["heading", "lheading", "image", "html_block", "html_inline", "reference", "entity"])


def render(content: str) -> str:
    """Return the HTML of a message in Markdown. Raises Refused if that is too long."""
    html = nh3.clean(
        _markdown.render(content),
        tags=ELEMENTS,
        attributes=ATTRIBUTES,
        url_schemes=SCHEMES,
        url_relative="deny",
        link_rel="noopener noreferrer nofollow",
    ).strip()
    if len(html) > MAX_FORMATTED:
        raise Refused(
            ErrorCode.INVALID, f"As HTML this would be longer than {MAX_FORMATTED} characters.", path="content"
        )
    return html
