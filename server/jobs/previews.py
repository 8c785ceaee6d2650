"""Link previews, from the page of a message's first link. They are off by default.

A page is fetched after the message was stored. The preview is then added as a change of the message.
"""

import asyncio
import contextlib
import logging
import re
import time
from collections import OrderedDict
from html import unescape
from itertools import islice
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from protocol.ids import UserId
from protocol.limits import MAX_CONTENT, visible
from protocol.values import LinkPreview, Message
from server.context import Events
from server.core.errors import log_failure
from server.core.faults import RowHeld
from server.db.database import Database
from server.domain.publish import publish_changed
from server.fairness.fair_queue import FairQueue
from server.fairness.shared_bound import SharedBound
from server.jobs.safe_http import SafeHttp, Unreachable
from server.queries import messages, previews
from server.queries.messages import At

MAX_PAGE_BYTES = 256 * 1024
MAX_PARTS = 1_000
"""Max titles, `meta` elements, scripts, styles and comments that are parsed, per page."""
MAX_PART, MAX_ATTRIBUTES = 4_096, 20
"""Max characters of a title or tag, and max attributes of a tag, that are parsed."""
KEPT = frozenset({"og:title", "og:description", "og:image", "description"})
"""Names of the `meta` elements that a preview uses."""
MAX_WAITING = 1_000
"""Max links that wait, per worker. Each user gets a share (`SharedBound`)."""
MAX_FETCHES = 4
"""Max links that are fetched concurrently, per worker. Each user has one at a time."""
PAUSE_SECONDS = 60.0
"""Time for which a failed host is not asked again for the same user, in seconds. After failures for `PAUSE_USERS` users
it is not asked for anybody.
"""
PAUSE_USERS = 3
MAX_PAUSES = 500
"""Max hosts whose pauses are remembered, per worker. The oldest pause is deleted first."""
TITLE, DESCRIPTION, LINK = 300, 1_000, 2_000
"""Max characters of a title, of a description, and of the address of an image."""

_PART = re.compile(r"<(!--|(?:title|meta|script|style)\b)", re.ASCII | re.IGNORECASE)
_ENDS = {
    "!--": re.compile("-->"), "title": re.compile("</title", re.IGNORECASE),
    "script": re.compile("</script", re.IGNORECASE), "style": re.compile("</style", re.IGNORECASE),
}  # fmt: skip
_ATTRIBUTE = re.compile(
    r"""(?P<name>[^\s=>"'/]++)(?:\s*+=\s*+(?:"(?P<double>[^"]*+)"|'(?P<single>[^']*+)'|(?P<bare>[^\s"'>]++)))?+"""
    "|(?P<end>>)"
)
_LINK = re.compile(r"https?://[^\s<>\"`\\]{1,2000}")

log = logging.getLogger(__name__)


class _Pause(NamedTuple):
    """The end of a host's pause, and the users for whom the host failed."""

    until: float
    users: frozenset[UserId]


class Previews:
    """Fetches the pages of messages' links. Users take turns, and each has one link in progress."""

    def __init__(self, database: Database, events: Events, safe_http: SafeHttp, *, are_on: bool) -> None:
        self._database = database
        self._events = events
        self._safe_http = safe_http
        self._are_on = are_on
        self._bound: SharedBound[UserId] = SharedBound(MAX_WAITING)
        self._lines: FairQueue[UserId, At] = FairQueue()
        """Messages by sender. They may wait long, so their content is read in their turn."""
        self._turns = asyncio.Semaphore(0)
        """The number of users who may have a turn."""
        self._pauses: OrderedDict[str, _Pause] = OrderedDict()

    def enqueue(self, message: Message) -> None:
        """Enqueue the first link of a message, unless its sender has too many in the queue."""
        if not self._are_on or message.content_type != "text" or first_link(message.content) is None:
            return
        if not self._bound.take(message.sender_id):
            log.info("no preview of message %s: its user sends too many links", message.id)
        elif self._lines.put(message.sender_id, At(message.conversation_id, message.id)):
            self._turns.release()

    async def work(self) -> None:
        """Fetch queued links, `MAX_FETCHES` concurrently, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(MAX_FETCHES):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            await self._turns.acquire()
            sender_id, at = self._lines.take()
            try:
                await self._preview(at, sender_id)
            except Unreachable as error:
                log.info("no preview of message %s: %s", at.message_id, error)
                self._pause(error.url, sender_id)
            except RowHeld:
                log.info("no preview of message %s: the conversation is busy", at.message_id)
            except Exception as error:  # noqa: BLE001 - other messages have links, too
                log_failure(log, "creating a preview", error)
            finally:
                self._bound.give(sender_id)
                if self._lines.done(sender_id):
                    self._turns.release()

    async def _preview(self, at: At, sender_id: UserId) -> None:
        async with self._database.connection() as db:
            found = await messages.find(db, at, sender_id)
        if found is None or found.message.is_deleted or found.message.is_moderated:
            return
        message = found.message
        if (link := first_link(message.content)) is None:
            return  # the message was edited meanwhile
        if self._is_paused(link, sender_id):
            return
        answer = await self._safe_http.get(link, most=MAX_PAGE_BYTES)
        if answer.status != 200 or "text/html" not in answer.headers.get("content-type", ""):  # noqa: PLR2004
            return
        preview = await asyncio.to_thread(read, answer.body, link, answer.url)
        if preview is None:
            return
        async with self._database.transaction() as db:
            found = await previews.lock(db, message)
            if found is None:
                return  # the message was edited, deleted or hidden meanwhile
            changed = await previews.put(db, message, preview)
        publish_changed(self._events, found, changed)

    def _is_paused(self, url: str, user_id: UserId) -> bool:
        pause = self._pauses.get(_host(url))
        if pause is None or pause.until <= time.monotonic():
            return False
        return user_id in pause.users or len(pause.users) >= PAUSE_USERS

    def _pause(self, url: str, user_id: UserId) -> None:
        if not (host := _host(url)):
            return  # the address itself is invalid
        now = time.monotonic()
        before = self._pauses.pop(host, None)
        users = before.users if before is not None and before.until > now else frozenset[UserId]()
        self._pauses[host] = _Pause(now + PAUSE_SECONDS, users | {user_id})
        if len(self._pauses) > MAX_PAUSES:
            self._pauses.popitem(last=False)


def _host(url: str) -> str:
    """Return the scheme, name and port of an address. Return an empty text if the address is invalid."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.hostname:
            return f"{parts.scheme}://{parts.hostname}:{parts.port}"
    return ""


def first_link(content: str) -> str | None:
    """Return the first link in a text."""
    found = _LINK.search(content[:MAX_CONTENT])
    return None if found is None else found[0].rstrip(".,;:!?)]}'")


def read(page: bytes, link: str, base: str) -> LinkPreview | None:
    """Return the preview of a page, or None if the page has no title. `base` is the page's address."""
    found = _said(page.decode(errors="replace"))
    title = _short(found.get("og:title") or found.get("title") or "", TITLE)
    if title is None:
        return None
    image = found.get("og:image")
    try:
        image = None if image is None else urljoin(base, image)
    except ValueError:
        image = None
    return LinkPreview(
        url=link,
        title=title,
        description=_short(found.get("og:description") or found.get("description") or "", DESCRIPTION),
        image=image if image is not None and len(image) <= LINK and _LINK.fullmatch(image) else None,
    )


def _short(text: str, most: int) -> str | None:
    return visible(" ".join(text.split()))[:most] or None


# The thread that parses a page holds the interpreter during each search, and so delays the worker. So no text is
# searched twice. A parser that starts again at each `<` took 0.3 s for unclosed tags.
def _said(page: str) -> dict[str, str]:
    """Return the first title of a page, and the contents of its `meta` elements by name."""
    found: dict[str, str] = {}
    at = 0
    for _ in range(MAX_PARTS):
        if (part := _PART.search(page, at)) is None:
            break
        kind, at = part[1].lower(), part.end()
        if kind == "meta":
            given, at = _attributes(page, at)
            name = (given.get("property") or given.get("name") or "").lower()
            if name in KEPT and given.get("content"):
                found.setdefault(name, unescape(given["content"]))
            continue
        if (end := _ENDS[kind].search(page, at)) is None:
            break
        if kind == "title" and not found.get("title"):
            found["title"] = unescape(page[at : min(end.start(), at + MAX_PART)].partition(">")[2]).strip()
        at = end.end()
    return found


def _attributes(page: str, at: int) -> tuple[dict[str, str], int]:
    """Return the attributes of a tag, and where they end."""
    given: dict[str, str] = {}
    for one in islice(_ATTRIBUTE.finditer(page, at, at + MAX_PART), MAX_ATTRIBUTES):
        at = one.end()
        if one["end"]:
            break
        given.setdefault(one["name"].lower(), one["double"] or one["single"] or one["bare"] or "")
    return given, at
