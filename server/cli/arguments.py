"""The arguments of a command: a refusal is one line, like every other."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from server.core.errors import Fatal


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


def named(text: str) -> str:
    """Return the name of a file or folder. Raises ArgumentTypeError for an empty one, as of a variable that is not set,
    and for `-`, which elsewhere stands for standard input or output.
    """
    if text in {"", "-"}:
        raise argparse.ArgumentTypeError("give the name of a file or a folder; one that is named `-` is `./-`")
    return text


def path(text: str) -> Path:
    """Return a file or folder that an argument names, as `named` does."""
    return Path(named(text))
