"""The arguments of a command: a refusal is one line, like every other."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from server.errors import Fatal


class Parser(argparse.ArgumentParser):
    """A parser that raises Fatal for what it refuses, instead of printing its usage and ending with status 2."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments."""
        raise Fatal(f"{message.rstrip('.')}. `{self.prog} --help` says what it takes.")

    def parse_known_args(  # type: ignore[override] # its overloads are about other namespaces
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuse what is not known here, where it is known which command it is of."""
        found: Any = super().parse_known_args(args, namespace)
        rest: list[str] = found[1]
        if rest and rest[0].startswith("--") and rest[0] != "--":
            self.error(f"`{self.prog}` has no option {rest[0].partition('=')[0]}")
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found[0], []
