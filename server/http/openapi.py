"""Generates the OpenAPI 3.1 document of the HTTP endpoints."""

from importlib.metadata import version
from typing import Any

from protocol.codec import tag
from protocol.export import Export
from protocol.http import ChangePassword, Confirm, LoggedIn, Login, Register, SessionList
from protocol.server import Error, Reply
from server.http.asyncapi import CLIENT_FRAMES, Schema, schemas
from server.routes import ROUTES

_SECURITY: list[dict[str, list[str]]] = [{"token": []}, {"cookie": []}]

CALLED = tuple(frame for frame in CLIENT_FRAMES if frame in ROUTES and not ROUTES[frame].socket_only)
"""The frames that `/v1/call` accepts."""
ALWAYS = (429, 500, 503)
"""Statuses of any request: an exceeded rate limit of the address, a defect of the server, and an unavailable
database.
"""
REFUSALS = {
    400: "The body is not valid JSON, or the frame's type is unknown.",
    401: "There is no session, or it has ended, or the e-mail address and the password do not match. With the `path` "
    "`ticket`, the credential is a return ticket, and the token may be valid.",
    403: "The page's origin, the user's role or a relationship forbids it, or the password is wrong.",
    404: "It does not exist, or the user may not see it.",
    409: "It conflicts with existing data. With `retry_after_ms`, the conflict is temporary.",
    422: "A field is missing, of the wrong type or out of range. `path` names it.",
    429: "A rate limit is exceeded. Retry after `retry_after_ms`.",
    500: "Internal error of the server; it was logged. Nothing was partly written.",
    503: "The server is busy, or its database is unavailable. Retry the same request after `retry_after_ms`.",
}
"""The meaning of each status."""
TIMED = frozenset({409, 429, 503})
"""Statuses whose error may have a retry time."""
BEFORE_ANY_PATH = (400, 408, 413, 431)
"""Statuses of requests that are invalid, incomplete or too large as HTTP, whatever their path."""


def document() -> Schema:
    """Return the OpenAPI document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "OpenChat HTTP",
            "version": version("openchat"),
            "description": "Accounts, sessions, single frames and health. The chat itself uses the WebSocket. "
            "A request that is invalid, incomplete or too large as HTTP gets status "
            f"{', '.join(map(str, BEFORE_ANY_PATH[:-1]))} or {BEFORE_ANY_PATH[-1]}, whatever its path. An "
            "unknown path gets 404, an unsupported method 405, and `/v1/ws` without a WebSocket handshake 426.",
        },
        "servers": [{"url": "/"}],
        "paths": {
            "/v1/auth/register": {
                "post": _operation("register", "Create an account and begin its first session.", body=Register)
                | _responses({"201": ("A session has begun.", LoggedIn)}, 400, 403, 409, 422)
            },
            "/v1/auth/login": {
                "post": _operation("login", "Begin a session.", body=Login)
                | _responses({"200": ("A session has begun.", LoggedIn)}, 400, 401, 403, 422)
            },
            "/v1/auth/logout": {
                "post": _operation("logout", "End this session.", is_secured=True)
                | _responses({"204": ("The session has ended.", None)}, 401, 403)
            },
            "/v1/auth/password": {
                "post": _operation(
                    "change_password",
                    "Change the password. All other sessions end.",
                    body=ChangePassword,
                    is_secured=True,
                )
                | _responses({"204": ("The password was changed.", None)}, 400, 401, 403, 422)
            },
            "/v1/auth/deactivate": {
                "post": _operation(
                    "deactivate", "Deactivate the account until the next login.", body=Confirm, is_secured=True
                )
                | _responses({"204": ("All sessions have ended.", None)}, 400, 401, 403, 422)
            },
            "/v1/auth/delete": {
                "post": _operation(
                    "delete",
                    "Delete the account. The user is erased after some days, in which a login restores the account.",
                    body=Confirm,
                    is_secured=True,
                )
                | _responses({"204": ("All sessions have ended.", None)}, 400, 401, 403, 422)
            },
            "/v1/auth/export": {
                "get": _operation("export", "Return all stored data of the user.", is_secured=True)
                | _responses({"200": ("The data.", Export)}, 401)
            },
            "/v1/auth/sessions": {
                "get": _operation("list_sessions", "Return the user's sessions.", is_secured=True)
                | _responses({"200": ("The sessions, newest first.", SessionList)}, 401),
                "delete": _operation("revoke_all_sessions", "End all sessions.", is_secured=True)
                | _responses({"204": ("All sessions have ended.", None)}, 401, 403),
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
                | _responses({"204": ("The session has ended.", None)}, 401, 403, 404)
            },
            "/v1/call": {
                "post": _operation("call", "Run one frame, as on the socket.", is_secured=True)
                | {"requestBody": _content({"oneOf": [_ref(frame) for frame in CALLED]}) | {"required": True}}
                | _responses({"200": ("The reply.", Reply)}, 400, 401, 403, 404, 409, 422)
            },
            "/healthz": {
                "get": _operation("alive", "Check that the process is alive.")
                | {"responses": {"200": {"description": "The process is alive."}}}
            },
            "/readyz": {
                "get": _operation("ready", "Check whether clients should be sent to this server.")
                | {
                    "responses": {
                        "200": {"description": "The server is ready.", **_content(_CHECKS)},
                        "503": {
                            "description": "The server is not ready. A false check tells why.",
                            **_content(_CHECKS),
                        },
                    }
                }
            },
            "/metrics": {
                "get": _operation("metrics", "Return the metrics of all workers, for Prometheus.")
                | {
                    "responses": {
                        "200": {
                            "description": "Metrics in the text format of Prometheus.",
                            "content": {"text/plain": {}},
                        },
                        "404": {"description": "This address, or a proxy, may not read metrics."},
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
