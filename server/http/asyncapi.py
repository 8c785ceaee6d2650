"""AsyncAPI 3: the socket, seen from the server."""

from importlib.metadata import version
from typing import Any, get_args

import msgspec

from protocol import SUBPROTOCOL
from protocol.client import ClientFrame, Frame
from protocol.errors import CloseCode
from protocol.limits import HASHTAG
from protocol.server import DurableEvent, Error, Reply, ServerFrame

Schema = dict[str, Any]
CLIENT_FRAMES: tuple[type[Frame], ...] = get_args(ClientFrame)
SERVER_FRAMES: tuple[type[msgspec.Struct], ...] = get_args(ServerFrame)
DURABLE: frozenset[type[msgspec.Struct]] = frozenset(get_args(DurableEvent))
ANSWERS = (Reply, Error)
ECMA = {HASHTAG: r"^[^\x00-/:-@\[-\^`{-\x7f]+$"}
"""Patterns that other languages read otherwise than Python, and what is described instead. `\\w` is ASCII there; the
description leaves it to the server which characters beyond ASCII are letters.
"""


def tag(frame: type[msgspec.Struct]) -> str:
    """Return what a frame says in `type`."""
    return str(frame.__struct_config__.tag)


def summary(what: type) -> str:
    """Return a docstring on one line."""
    return " ".join((what.__doc__ or "").split())


def schemas(*types: Any) -> Schema:  # noqa: ANN401 - whatever msgspec describes
    """Return the JSON schemas of types and of all that they use, by name."""
    _, found = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    return {name: _in_ecma(one) for name, one in found.items()}


def _in_ecma(schema: Any) -> Any:  # noqa: ANN401 - any JSON
    """Return a schema with its patterns as other languages write them, where `$` is the end and nothing else."""
    if isinstance(schema, dict):
        return {
            key: ECMA.get(inner, inner.replace(r"\Z", "$"))
            if key == "pattern" and isinstance(inner, str)
            else _in_ecma(inner)
            for key, inner in schema.items()
        }
    return [_in_ecma(inner) for inner in schema] if isinstance(schema, list) else schema


def document() -> Schema:
    """Return the description of the socket."""
    frames = [*CLIENT_FRAMES, *SERVER_FRAMES]
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "OpenChat socket",
            "version": version("openchat"),
            "description": "Frames of JSON in text messages. "
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
                                    "description": "Say only `ready`: the client will `resume`.",
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
    return "reconnect." if code.reconnect else "do not reconnect by itself."


def _in_asyncapi(schema: Any) -> Any:  # noqa: ANN401 - any part of a schema
    """Return a schema with its discriminators as AsyncAPI has them: the property's name alone."""
    if isinstance(schema, list):
        return [_in_asyncapi(one) for one in schema]
    if isinstance(schema, dict):
        return {
            key: value["propertyName"] if key == "discriminator" else _in_asyncapi(value)
            for key, value in schema.items()
        }
    return schema
