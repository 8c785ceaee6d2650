"""The OpenAPI and AsyncAPI documents are complete and match the responses of the server.

In all tests, `http_client` compares the status of each response with the OpenAPI document.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec import inspect

from protocol.codec import tag
from protocol.limits import HASHTAG
from server.describe import handbook
from server.http import asyncapi, openapi
from server.http.asyncapi import CLIENT_FRAMES
from tests.test_hostile_values import valid
from tests.world import World, http_client, require_described


def references(part: Any) -> Iterator[str]:
    """Yield all references in a document, including those of discriminators."""
    if isinstance(part, dict):
        for key, inner in part.items():
            if key == "$ref":
                yield inner
            elif key == "mapping":
                yield from inner.values()
            else:
                yield from references(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from references(inner)


DOCUMENTS = pytest.mark.parametrize("document", [asyncapi.document(), openapi.document()], ids=["asyncapi", "openapi"])


def patterns(part: Any) -> Iterator[str]:
    """Yield all regular expressions in a document."""
    if isinstance(part, dict):
        if isinstance(pattern := part.get("pattern"), str):
            yield pattern
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from patterns(inner)


def faults(pattern: str) -> list[str]:
    """Return the parts of a pattern that ECMA-262 with the flag `u` refuses, or reads differently from Python.

    `\\d`, `\\w` and `\\b` are ASCII there. `\\s` differs only in control and format characters, which fields refuse.
    """
    found, at, is_class = [], 0, False
    while at < len(pattern):
        escape = re.compile(r"\\(u\{[0-9a-f]+\}|u[0-9a-f]{4}|x[0-9a-f]{2}|.)|\{\d+(?:,\d*)?\}", re.DOTALL).match(
            pattern, at
        )
        one = pattern[at] if escape is None else escape[0]
        if escape is not None:
            named = escape[1] or "{"  # or a repetition
            is_known = len(named) > 1 or named in "^$\\.*+?()[]{}|/stnvfrS" or (is_class and named == "-")
            found += [] if is_known else [one]
        elif is_class:
            is_class = one != "]"
        elif one == "[":
            is_class = True
        elif one in "]{}" or re.compile(r"\(\?(?![:=!]|<[=!])|[*+?]\+").match(pattern, at):
            found.append(one)
        at += len(one)
    return found + (["["] if is_class else [])


@DOCUMENTS
def test_every_pattern_is_valid_in_ecma_262(document: dict[str, Any]) -> None:
    found = set(patterns(document))
    assert len(found) > 8
    assert {pattern: faults(pattern) for pattern in found if faults(pattern)} == {}
    refused = [r"\"", r"[^\"]", r"\'", r"\-", r"\Z", r"\A", r"\w", r"[\d]", r"\b", "{", "a{,2}", "]", "(?i)a",
               "(?P<a>b)", "a++", "["]  # fmt: skip
    assert [one for one in refused if not faults(one)] == []
    assert faults(r"^(?=.*[^\s\x00-\u034f\-{\[])(?!a)\.(?:b|\/){2,}c+?$") == []


def test_pattern_of_hashtags_matches_those_that_the_server_accepts() -> None:
    described = re.compile(asyncapi.ECMA[HASHTAG])
    taken = [one for one in map(chr, range(sys.maxunicode + 1)) if re.match(HASHTAG, one)]
    assert len(taken) > 100_000
    assert [one for one in taken if not described.search(one)] == []
    assert [chr(code) for code in range(128) if described.search(chr(code)) and chr(code) not in taken] == []


@DOCUMENTS
def test_every_reference_resolves_and_every_schema_is_used(document: dict[str, Any]) -> None:
    found = set(references(document))
    assert len(found) > 100
    for reference in found:
        part: Any = document
        assert reference.startswith("#/")
        for step in reference[2:].split("/"):
            assert step in part, reference
            part = part[step]
    schemas = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert schemas - found == set()
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in document["components"]["schemas"])


async def test_socket_only_frames_are_documented_as_such(world: World) -> None:
    """Each frame is sent over HTTP, with fields that can be decoded."""
    who, refused = await world.user("Ada"), set()
    async with http_client(world.url) as http:
        for frame in CLIENT_FRAMES:
            body = json.dumps(valid(inspect.type_info(frame), "", {}))
            answer = await http.post("/v1/call", content=body, headers={"Authorization": f"Bearer {who.token}"})
            error = answer.json() if answer.is_error else {}
            assert error.get("code") not in {"bad_frame", "internal"}, error
            if error.get("message", "").startswith("This frame needs a WebSocket connection"):
                refused.add(frame)
    assert {tag(frame) for frame in refused} == {"authenticate", "resume", "watch", "unwatch"}
    assert refused == set(CLIENT_FRAMES) - set(openapi.CALLED)
    taken = openapi.document()["paths"]["/v1/call"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {one["$ref"].rpartition("/")[2] for one in taken["oneOf"]} == {frame.__name__ for frame in openapi.CALLED}
    sections = re.split(r"^### ", handbook.document().partition("## Replies")[0], flags=re.MULTILINE)[1:]
    assert {one.partition("\n")[0] for one in sections if "Socket only." in one} == {tag(frame) for frame in refused}


async def test_login_from_a_foreign_origin_is_refused_as_documented(world: World) -> None:
    async with http_client(world.url) as http:
        body = {"email": "ada@example.org", "password": "correct horse"}
        answer = await http.post("/v1/auth/login", json=body, headers={"Origin": "https://evil.example"})
        assert answer.status_code == 403
        await require_described(answer)
        answer.status_code = 418
        with pytest.raises(AssertionError, match="418"):
            await require_described(answer)
    (server,) = openapi.document()["servers"]
    assert server == {"url": "/"}, "relative to the address of the document"
