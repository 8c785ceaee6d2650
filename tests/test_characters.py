"""Characters that are invisible, reorder text or break lines are refused in single-line fields."""

import ast
import re
import sys
import unicodedata
from pathlib import Path

import msgspec
import pytest

from protocol import client
from protocol.client import CreateGroup, UpdateProfile
from protocol.errors import ErrorCode
from protocol.ids import ConversationId, uuid7
from protocol.limits import CustomStatus, Description, Email, Link, Name, Query, Reason, Text, Title, visible
from protocol.payloads import File, Image, Payload
from tests.trees import parsed
from tests.world import Room, World, http_client, refused, sent

ROOT = Path(__file__).parent.parent
JOINERS = "\u200c\u200d"
HIDDEN = [
    chr(one)
    for one in range(sys.maxunicode + 1)
    if unicodedata.category(chr(one)) in {"Cc", "Cf", "Zl", "Zp"} and chr(one) not in JOINERS
]
VISIBLE = ["Ada", "O'Brien-Śmith", "می\u200cخواهم", "क्\u200dष", "👩\u200d🚀", "李", "a b", "ﬁ"]  # noqa: RUF001 - other scripts


def fits(kind: object, text: str) -> bool:
    try:
        msgspec.convert(text, kind)
    except msgspec.ValidationError:
        return False
    return True


@pytest.mark.parametrize("kind", [Name, Title, CustomStatus, Text])
def test_single_line_field_refuses_hidden_characters(kind: object) -> None:
    assert all(fits(kind, text) for text in VISIBLE)
    assert [one for one in HIDDEN if any(fits(kind, text) for text in (one, f"a{one}b", f"a{one}"))] == []


@pytest.mark.parametrize("kind", [Name, Title, CustomStatus, Text])
def test_single_line_field_needs_a_visible_character(kind: object) -> None:
    # Default_Ignorable_Code_Point (Unicode 16, DerivedCoreProperties.txt), without HIDDEN.
    ignorable = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\ufe00\ufe0f\uffa0\U000e0100\U000e01ef"
    spaces = [chr(one) for one in range(sys.maxunicode + 1) if chr(one).isspace() and chr(one) not in HIDDEN]
    for one in [*JOINERS, *ignorable, *spaces, "\u2800"]:
        assert not any(fits(kind, text) for text in (one, 2 * one, f" {one}")), repr(one)
        assert fits(kind, f"a{one}b"), repr(one)
        assert not visible(f" {one}"), repr(one)


@pytest.mark.parametrize("kind", [Description, Reason])
def test_multi_line_field_allows_only_line_breaks_of_the_hidden_characters(kind: object) -> None:
    assert all(fits(kind, text) for text in [*VISIBLE, "a\r\n\tb\n"])
    assert [one for one in HIDDEN if fits(kind, f"a{one}b")] == ["\t", "\n", "\r"]


def test_search_text_may_contain_hidden_characters() -> None:
    assert fits(Query, "a\tb\u200b\n")
    assert not fits(Query, "a\0b")


def test_addresses_refuse_hidden_characters_and_links_refuse_quotes() -> None:
    assert fits(Email, "ada@example.org")
    assert fits(Email, "zoë@exämple.org")
    for one in [*HIDDEN, *JOINERS, " ", "\u3000"]:
        assert not any(fits(Email, text) for text in (f"a{one}da@example.org", f"ada@example.org{one}")), repr(one)
    assert fits(Link, "https://example.org/~a?b=(c)&d='e'#f%22")
    for one in [*HIDDEN, *'"<>`\\ ']:
        assert not any(fits(Link, f"https://example.org/{rest}") for rest in (f"{one}x", one)), repr(one)


async def test_error_names_its_field_in_words(room: Room) -> None:
    group = CreateGroup(conversation_id=ConversationId(uuid7()), participants=[room.users[1].id], title="News\u200b")
    frames: list[tuple[client.Frame, str]] = [
        (UpdateProfile(name="Ada\u202e"), "name"), (UpdateProfile(display_name="Ada\n"), "display_name"),
        (UpdateProfile(bio="a\x1b[2J"), "bio"), (UpdateProfile(image='https://example.org/"'), "image"),
        (group, "title"),
        (client.SetPresence(status="online", custom_status="\u2066"), "custom_status"),
    ]  # fmt: skip
    for frame, path in frames:
        with refused(ErrorCode.INVALID, path) as error:
            await room.ada.call(frame)
        assert "regex" not in str(error.value)
    payloads: list[tuple[Payload, str]] = [
        (File(url="https://example.org/x", name="gpj.exe\u202e"), "payload.name"),
        (Image(url="https://example.org/<x>"), "payload.url"),
    ]
    for payload, path in payloads:
        with refused(ErrorCode.INVALID, path):
            await sent(room.ada, room.group, payload=payload)
    await room.ada.call(UpdateProfile(name="Ada 👩\u200d🚀", bio="one\ntwo"))


@pytest.mark.parametrize(
    "twin", ["ada@example.org\n", "ADA@example.org", "ada@example.org\u200b", "ada@exa\u00admple.org"]
)
async def test_variant_of_a_taken_address_cannot_be_registered(world: World, twin: str) -> None:
    async with http_client(world.workers[0].url) as http:
        first = {"name": "Ada", "email": "ada@example.org", "password": "correct horse"}
        assert (await http.post("/v1/auth/register", json=first)).status_code == 201
        answer = await http.post("/v1/auth/register", json=first | {"email": twin})
    assert answer.status_code in {409, 422}
    assert answer.json()["path"] == "email"


async def test_address_with_a_decomposed_accent_is_the_same_address(world: World) -> None:
    async with http_client(world.workers[0].url) as http:
        # The lower case of an accented letter may have a composed form that the upper case lacks.
        first = {"name": "Zoë", "email": "zoe\u0308J\u030c@example.org", "password": "correct horse"}
        assert (await http.post("/v1/auth/register", json=first)).status_code == 201
        again = {"email": "ZO\u00cb\u01f0@example.org", "password": first["password"]}
        assert (await http.post("/v1/auth/login", json=again)).status_code == 200
        assert (await http.post("/v1/auth/register", json=first | again)).status_code == 409


def test_no_pattern_accepts_a_trailing_line_break() -> None:
    r"""In Python, `$` also matches before a line break at the end; `\Z` does not."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("protocol", "server")
        for path in (ROOT / folder).rglob("*.py")
        if path.parent.name != "describe" and path.stem not in {"asyncapi", "openapi"}  # patterns for our own names
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.search(r"(?<!\\)\$(?:\)*\Z)", node.value)
    ]
    assert found == []
