"""Generates the documents about the protocol, the settings, the metrics and the database. `python -m server.describe
docs` writes them.
"""

import json
from collections.abc import Callable

from server.describe import columns, handbook, metrics, rules, settings
from server.http import asyncapi, openapi

DOCUMENTS: dict[str, Callable[[], str]] = {
    "asyncapi.json": lambda: json.dumps(asyncapi.document(), indent=1) + "\n",
    "openapi.json": lambda: json.dumps(openapi.document(), indent=1) + "\n",
    "protocol.md": handbook.document,
    "roles.md": rules.roles,
    "privacy.md": rules.people,
    "settings.md": settings.document,
    "metrics.md": metrics.document,
    "columns.md": columns.document,
}
"""The documents in docs/, by file name."""
