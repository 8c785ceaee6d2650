"""Generates the AsyncAPI 3 document of the socket, from the server's point of view."""

from importlib.metadata import version
from typing import Any, get_args

import msgspec

from protocol import SUBPROTOCOL
from protocol.client import ClientFrame, Frame
from protocol.codec import tag
from protocol.errors import CloseCode
from protocol.limits import HASHTAG
from protocol.server import DurableEvent, Error, Reply, ServerFrame

Schema = dict[str, Any]
CLIENT_FRAMES: tuple[type[Frame], ...] = get_args(ClientFrame)
SERVER_FRAMES: tuple[type[msgspec.Struct], ...] = get_args(ServerFrame)
DURABLE: frozenset[type[msgspec.Struct]] = frozenset(get_args(DurableEvent))
ANSWERS = (Reply, Error)
ECMA = {HASHTAG: r"^[^\x00-/:-@\[-\^`{-\x7f]+$"}
"""Patterns that mean something else in other languages, and their replacements in the document. `\\w` is ASCII there,
so the document leaves letters beyond ASCII to the server.
"""


def summary(what: type) -> str:
    """Return a docstring on one line."""
    return " ".join((what.__doc__ or "").split())


def schemas(*types: Any) -> Schema:  # noqa: ANN401 - any type that msgspec describes
    """Return the JSON schemas of types and of all types that they use, by name."""
    _, found = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    return {name: _in_ecma(one) for name, one in found.items()}


def _in_ecma(schema: Any) -> Any:  # noqa: ANN401 - any JSON
    """Return a schema with its patterns in the syntax of other languages, where `$` matches the end only."""
    if isinstance(schema, dict):
        return {
            key: ECMA.get(inner, inner.replace(r"\Z", "$"))
            if key == "pattern" and isinstance(inner, str)
            else _in_ecma(inner)
            for key, inner in schema.items()
        }
    return [_in_ecma(inner) for inner in schema] if isinstance(schema, list) else schema


def document() -> Schema:
    """Return the AsyncAPI document."""
    frames = [*CLIENT_FRAMES, *SERVER_FRAMES]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "OpenChat socket",
            "version": version("openchat"),
            "description": "Each frame is a JSON object in a text message. "
            + " ".join(f"{code.value} {code.name.lower()}: {_meaning(code)}" for code in CloseCode),
        },
        "defaultContentType": "application/json",
        "servers": {
            "here": {
                "host": "{host}",
                "protocol": "ws",
                "description": "The host that serves this document; `wss` behind TLS.",
                "variables": {"host": {"default": "127.0.0.1:8000"}},
            }
        },
        "channels": {
            "socket": {
                "address": "/v1/ws",
                "description": f"Subprotocol {SUBPROTOCOL}.",
                "messages": {tag(frame): {"$ref": f"#/components/messages/{tag(frame)}"} for frame in frames},
                "bindings": {
                    "ws": {
                        "method": "GET",
                        "query": {
                            "type": "object",
                            "properties": {
                                "resume": {
                                    "const": "1",
                                    "description": "Send only `ready`, because the client will send `resume`.",
                                }
                            },
                        },
                    }
                },
            }
        },
        "operations": {
            **{tag(frame): _received(frame) for frame in CLIENT_FRAMES},
            **{tag(frame): _sent(frame) for frame in SERVER_FRAMES if frame not in ANSWERS},
        },
        "components": {
            "messages": {
                tag(frame): {
                    "name": tag(frame),
                    "summary": summary(frame),
                    "payload": {"$ref": f"#/components/schemas/{frame.__name__}"},
                }
                for frame in frames
            },
            "schemas": _in_asyncapi(schemas(*frames)),
        },
    }


def _received(frame: type[Frame]) -> Schema:
    return {
        "action": "receive",
        "channel": {"$ref": "#/channels/socket"},
        "summary": summary(frame),
        "messages": [{"$ref": f"#/channels/socket/messages/{tag(frame)}"}],
        "reply": {
            "channel": {"$ref": "#/channels/socket"},
            "messages": [{"$ref": f"#/channels/socket/messages/{tag(answer)}"} for answer in ANSWERS],
        },
    }


def _sent(frame: type[msgspec.Struct]) -> Schema:
    return {
        "action": "send",
        "channel": {"$ref": "#/channels/socket"},
        "summary": summary(frame),
        "messages": [{"$ref": f"#/channels/socket/messages/{tag(frame)}"}],
    }


def _meaning(code: CloseCode) -> str:
    return "reconnect." if code.reconnect else "do not reconnect automatically."


def _in_asyncapi(schema: Any) -> Any:  # noqa: ANN401 - any part of a schema
    """Return a schema with discriminators in the form of AsyncAPI, which is the name of the property."""
    if isinstance(schema, list):
        return [_in_asyncapi(one) for one in schema]
    if isinstance(schema, dict):
        return {
            key: value["propertyName"] if key == "discriminator" else _in_asyncapi(value)
            for key, value in schema.items()
        }
    return schema
