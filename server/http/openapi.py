"""OpenAPI 3.1: what there is over HTTP."""

from importlib.metadata import version
from typing import Any

from protocol.export import Export
from protocol.http import ChangePassword, Confirm, LoggedIn, Login, Register, SessionList
from protocol.server import Error, Reply
from server.http.asyncapi import CLIENT_FRAMES, Schema, schemas, tag
from server.routes import ROUTES

_SECURITY: list[dict[str, list[str]]] = [{"token": []}, {"cookie": []}]

CALLED = tuple(frame for frame in CLIENT_FRAMES if frame in ROUTES and not ROUTES[frame].socket_only)
"""The frames that `/v1/call` takes."""
ALWAYS = (429, 500, 503)
"""Too many requests of an address, a defect of ours, and a database that is away may be the answer to any request."""
REFUSALS = {
    400: "The body is no JSON, or the type of a frame is not known.",
    401: "There is no session, or it has ended, or address and password do not match. With the `path` `ticket`, the "
    "credential is a return ticket, and the token may be good.",
    403: "Not allowed: the page's origin, the user's role or relationship, or the password of the session is wrong.",
    404: "It does not exist, or the user may not see it.",
    409: "It contradicts what is there. With `retry_after_ms`, only for now.",
    422: "A field is missing, of the wrong type or out of bounds; `path` names it.",
    429: "Too many, or too many for now: repeat the request after `retry_after_ms`.",
    500: "A defect of the server. It was logged; nothing was half-written.",
    503: "The server is busy, or its database is away: repeat the same request after `retry_after_ms`.",
}
"""What each refusal means."""
TIMED = frozenset({409, 429, 503})
"""Refusals that may tell when to repeat the request."""
BEFORE_ANY_PATH = (400, 408, 413, 431)
"""The answers to what is no whole, valid request within bounds. It may have no path."""


def document() -> Schema:
    """Return the description of the HTTP endpoints."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "OpenChat HTTP",
            "version": version("openchat"),
            "description": "Accounts and sessions, one frame at a time, health. The chat itself is on the socket. "
            "A request that is invalid, incomplete or too large as HTTP gets "
            f"{', '.join(map(str, BEFORE_ANY_PATH[:-1]))} or {BEFORE_ANY_PATH[-1]}, whatever its path. A path that "
            "is not there is 404, another method 405, and `/v1/ws` without a WebSocket handshake 426.",
        },
        "servers": [{"url": "/"}],
        "paths": {
            "/v1/auth/register": {
                "post": _operation("register", "Make an account and begin its first session.", body=Register)
                | _responses({"201": ("A session has begun.", LoggedIn)}, 400, 403, 409, 422)
            },
            "/v1/auth/login": {
                "post": _operation("login", "Begin a session.", body=Login)
                | _responses({"200": ("A session has begun.", LoggedIn)}, 400, 401, 403, 422)
            },
            "/v1/auth/logout": {
                "post": _operation("logout", "End this session.", is_secured=True)
                | _responses({"204": ("It has ended.", None)}, 401, 403)
            },
            "/v1/auth/password": {
                "post": _operation(
                    "change_password",
                    "Take another password; all other sessions end.",
                    body=ChangePassword,
                    is_secured=True,
                )
                | _responses({"204": ("It has been changed.", None)}, 400, 401, 403, 422)
            },
            "/v1/auth/deactivate": {
                "post": _operation("deactivate", "Go away until the next login.", body=Confirm, is_secured=True)
                | _responses({"204": ("All sessions have ended.", None)}, 400, 401, 403, 422)
            },
            "/v1/auth/delete": {
                "post": _operation(
                    "delete",
                    "Go away for good: erased after some days, in which a login undoes it.",
                    body=Confirm,
                    is_secured=True,
                )
                | _responses({"204": ("All sessions have ended.", None)}, 400, 401, 403, 422)
            },
            "/v1/auth/export": {
                "get": _operation("export", "Return everything that is stored about the user.", is_secured=True)
                | _responses({"200": ("The data.", Export)}, 401)
            },
            "/v1/auth/sessions": {
                "get": _operation("list_sessions", "Return the user's sessions.", is_secured=True)
                | _responses({"200": ("The sessions, newest first.", SessionList)}, 401),
                "delete": _operation("revoke_all_sessions", "End all sessions.", is_secured=True)
                | _responses({"204": ("They have ended.", None)}, 401, 403),
            },
            "/v1/auth/sessions/{session_id}": {
                "delete": _operation("revoke_session", "End one session.", is_secured=True)
                | {
                    "parameters": [
                        {
                            "name": "session_id",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string", "format": "uuid"},
                        }
                    ]
                }
                | _responses({"204": ("It has ended.", None)}, 401, 403, 404)
            },
            "/v1/call": {
                "post": _operation("call", "Run one frame, as on the socket.", is_secured=True)
                | {"requestBody": _content({"oneOf": [_ref(frame) for frame in CALLED]}) | {"required": True}}
                | _responses({"200": ("The reply.", Reply)}, 400, 401, 403, 404, 409, 422)
            },
            "/healthz": {
                "get": _operation("alive", "Say that the process answers.")
                | {"responses": {"200": {"description": "It does."}}}
            },
            "/readyz": {
                "get": _operation("ready", "Say whether clients should be sent here.")
                | {
                    "responses": {
                        "200": {"description": "Yes.", **_content(_CHECKS)},
                        "503": {"description": "No; the check that is false says why.", **_content(_CHECKS)},
                    }
                }
            },
            "/metrics": {
                "get": _operation("metrics", "All workers' numbers, for Prometheus.")
                | {
                    "responses": {
                        "200": {"description": "The text format.", "content": {"text/plain": {}}},
                        "404": {"description": "Not from this address, or not through a proxy."},
                        "429": _refusal(429),
                    }
                }
            },
        },
        "components": {
            "schemas": schemas(
                *CALLED, Reply, Error, Register, Login, LoggedIn, SessionList, Confirm, ChangePassword, Export
            ),
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "cookie": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": "__Host-openchat_session",
                    "description": "Without TLS, `openchat_session`.",
                },
            },
        },
        "tags": [{"name": tag(frame), "description": "A frame for /v1/call."} for frame in CALLED],
    }


_CHECKS: Schema = {"type": "object", "additionalProperties": {"type": "boolean"}}


def _operation(name: str, what: str, *, body: type | None = None, is_secured: bool = False) -> Schema:
    operation: Schema = {"operationId": name, "summary": what}
    if body is not None:
        operation["requestBody"] = {"required": True, **_content(_ref(body))}
    if is_secured:
        operation["security"] = _SECURITY
    return operation


def _responses(good: dict[str, tuple[str, type | None]], *refusals: int) -> Schema:
    found: Schema = {
        status: {"description": what, **({} if kind is None else _content(_ref(kind)))}
        for status, (what, kind) in good.items()
    }
    return {"responses": found | {str(status): _refusal(status) for status in (*refusals, *ALWAYS)}}


def _refusal(status: int) -> Schema:
    headers = {
        "Retry-After": {"description": "`retry_after_ms` in seconds, rounded up.", "schema": {"type": "integer"}}
    }
    return {
        "description": REFUSALS[status],
        **({"headers": headers} if status in TIMED else {}),
        **_content(_ref(Error)),
    }


def _content(schema: Schema) -> Schema:
    return {"content": {"application/json": {"schema": schema}}}


def _ref(kind: Any) -> Schema:  # noqa: ANN401 - a struct's class
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
