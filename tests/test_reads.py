"""Statements that read many rows have a LIMIT, or are named here with what bounds them.

A first look, no proof: of a statement that reads from a query in parentheses, only the parts that gather are looked at.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator

import server.queries

KEYS = "named by key: as many as the caller named, whose number is bounded"
MANY = "counts a user's own, which has a highest number (docs/limits.md)"
OUTER = "as many as the query inside, which is checked by itself"
HIDING = "those who block one user or hide from them, by an index of those alone"
OPERATOR = "asked by an operator"
BOUNDED = {
    "accounts.CARD": OPERATOR,
    "approaches.COUNT": KEYS,
    "bounds.MADE": MANY,
    "bounds.MEMBERSHIPS": MANY,
    "bounds.REPORTS": MANY,
    "bounds.RELATIONSHIPS": MANY,
    "bounds.REQUESTS": MANY,
    "bounds.STARS": MANY,
    "bounds.THREADS": MANY,
    "changes.READING": "receipts in conversations of up to 100; " + HIDING,
    "checks.EXPECTED": OPERATOR,
    "checks.SEEN": OPERATOR,
    "checks.SIZES": OPERATOR,
    "checks.SOMEBODY": OPERATOR,
    "conversations.ORDER": "ids of a user's 5,000 conversations, which have to be sorted to be read in pages",
    "drafts.EMPTY": "drafts in a conversation that ends, one of each participant",
    "edits.COUNT": "edits of a message: 1,000",
    "erasure.TAKES_PART": "conversations of one who is erased, in the background",
    "erasure.TRACES": OPERATOR,
    "erasure.WORDS": OPERATOR,
    "exports.HEAD": "a person's own data: one export a minute and worker, three at a time",
    "exports.MESSAGES": "edits of a message: 1,000",
    "exports.REACTIONS": "a person's own data, as above",
    "indexing.PAGE": OUTER,
    "messages.GET": "emoji of a user on a message: 100",
    "messages.PAGE": "emoji of a user on a message: 100",
    "messages.REPLIES": "emoji of a user on a message: 100",
    "messages.TIMELINE": "emoji of a user on a message: 100",
    "participants.ADD": KEYS,
    "participants.INVITE": KEYS,
    "pins.PINNED": "pins of a conversation: 100",
    "polls.VOTE": "options of a poll: 20",
    "receipts.READERS": "named in conversations of up to 100; " + HIDING,
    "reactions.REACT": "emoji of a user on a message: 100",
    "scheduled.WAITING": "messages of a user that wait: 100",
    "sending.SEND": KEYS,
    "sessions.REVOKE": "sessions of a user: 100",
    "users.ALL_MAY": KEYS,
    "users.UNSEEN": HIDING,
    "welcome.GUESTS": KEYS,
    "whereabouts.OF": "participants are counted; " + HIDING,
}
"""Reads without a LIMIT, and what bounds each."""
GATHERS = re.compile(r"json_agg|json_object_agg|array_agg|string_agg|\bcount\b|\bsum\b")
STATEMENT = re.compile(r"\s*(SELECT|WITH|INSERT|UPDATE|DELETE|\(SELECT)")
IS_BOUNDED = re.compile(r"\bLIMIT\b|(?<!NOT )\b[\w.]+ = ANY\(\)|(FROM|LATERAL) \(\)")
"""Has a LIMIT, or names the keys, or reads from a query in parentheses, which is checked by itself."""


def selects(statement: str) -> Iterator[tuple[str, str]]:
    """Return each query of a statement, without those inside it, and what stands before its parenthesis."""
    plain = re.sub(r"'(?:[^']|'')*'", "''", re.sub(r"--[^\n]*", "", statement))
    open_ones = [""]
    for letter in plain:
        if letter == "(":
            open_ones.append("")
        elif letter == ")" and len(open_ones) > 1:
            inside = open_ones.pop()
            yield open_ones[-1], inside
            open_ones[-1] += "()"
        else:
            open_ones[-1] += letter
    yield "", open_ones[0]


def unbounded(statement: str, *, is_fetched: bool) -> list[str]:
    """Return the queries of a statement that read many rows without a LIMIT."""
    found = []
    for before, query in selects(statement):
        if not re.search(r"\bFROM\b", query) or IS_BOUNDED.search(query):
            continue
        if GATHERS.search(query) or before.endswith("ARRAY") or (not before and is_fetched):
            found.append(" ".join(query.split()))
    return found


def test_every_read_of_many_rows_is_bounded() -> None:
    found: dict[str, list[str]] = {}
    for module in pkgutil.iter_modules(server.queries.__path__):
        queries = importlib.import_module(f"server.queries.{module.name}")
        source = inspect.getsource(queries)
        for name, text in vars(queries).items():
            is_own = not name.startswith("_") and f"\n{name} = " in source
            if not is_own or not isinstance(text, str) or not STATEMENT.match(text):
                continue
            if without := unbounded(text, is_fetched=re.search(rf"\.fetch\(\s*{name}\b", source) is not None):
                found[f"{module.name}.{name}"] = without
    assert {name: text for name, text in found.items() if name not in BOUNDED} == {}, "give it a LIMIT, or a reason"
    assert BOUNDED.keys() - found.keys() == set(), "these have a LIMIT now"


def test_a_read_without_limit_is_found() -> None:
    assert unbounded("SELECT id FROM message WHERE sender_id = $1", is_fetched=True)
    assert unbounded("SELECT ARRAY(SELECT id FROM message)", is_fetched=False)
    assert unbounded("SELECT (SELECT json_agg(m.id) FROM message m)", is_fetched=False)
    assert not unbounded("SELECT id FROM message WHERE sender_id = $1 LIMIT 5", is_fetched=True)
    assert not unbounded("SELECT count(*) FROM (SELECT FROM message LIMIT 5) m", is_fetched=False)
