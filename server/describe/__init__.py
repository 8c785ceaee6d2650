"""Generates the documents about the protocol and the database: AsyncAPI 3, OpenAPI 3.1, the handbook, the matrices of
roles and privacy, and the columns. `python -m server.describe docs` writes them.
"""

import json
from collections.abc import Callable

from server.describe import columns, handbook, rules
from server.http import asyncapi, openapi

DOCUMENTS: dict[str, Callable[[], str]] = {
    "asyncapi.json": lambda: json.dumps(asyncapi.document(), indent=1) + "\n",
    "openapi.json": lambda: json.dumps(openapi.document(), indent=1) + "\n",
    "protocol.md": handbook.document,
    "roles.md": rules.roles,
    "privacy.md": rules.people,
    "columns.md": columns.document,
}
"""The documents in docs/, by file name."""
