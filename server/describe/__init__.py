"""The wire, described: AsyncAPI 3 for the socket, OpenAPI 3.1 for HTTP, a handbook for people, the rules as tables, the
columns with what uses them. All of it is generated from the code; `python -m server.describe docs` writes it.
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
"""What belongs into docs/, by file name."""
