"""Installs the packages of this repository below one name: `server` as `openchat.server`, and so on.

Hatchling runs this hook for a wheel, not for an editable installation. docs/decisions/0070 says why.
"""

import ast
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAME = "openchat"
PACKAGES = ("server", "protocol", "loadtest", "prove")
BUILD_ONLY = "server/describe"
"""Reads files of the repository, and is not installed."""
DATA = {"schema.sql": f"{NAME}/server/schema.sql", "migrations": f"{NAME}/server/migrations"}


class Edit(NamedTuple):
    """Bytes of a line to replace."""

    line: int
    column: int
    old: str
    new: str


class RenameError(Exception):
    """A line of the source refers to a module in a way that this hook does not rewrite."""


def _imports(node: ast.AST, modules: frozenset[str]) -> Iterator[Edit]:
    """Yield an edit for each module of this repository that a statement imports."""
    if isinstance(node, ast.ImportFrom) and not node.level and node.module in modules:
        yield Edit(node.lineno, node.col_offset, f"from {node.module}", f"from {NAME}.{node.module}")
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name in modules and not alias.asname:
                raise RenameError(f"{node.lineno}: write `from … import …` instead of `import {alias.name}`")
            if alias.name in modules:
                yield Edit(alias.lineno, alias.col_offset, alias.name, f"{NAME}.{alias.name}")


def _strings(tree: ast.AST, modules: frozenset[str]) -> Iterator[Edit]:
    """Yield an edit for each string that is the dotted name of such a module, or begins with one and a colon."""
    in_f_strings = {id(part) for one in ast.walk(tree) if isinstance(one, ast.JoinedStr) for part in one.values}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, (str, bytes)):
            continue
        text = node.value if isinstance(node.value, str) else node.value.decode(errors="replace")
        name = text.partition(":")[0]
        if id(node) in in_f_strings and "." in name and name.rstrip(".") in modules:
            raise RenameError(f"{node.lineno}: an f-string contains the module name {name}")
        if "." in name and name in modules:
            quote = 'b"' if isinstance(node.value, bytes) else '"'
            yield Edit(node.lineno, node.col_offset, f"{quote}{name}", f"{quote}{NAME}.{name}")


def renamed(source: str, modules: frozenset[str]) -> str:
    """Return a file's text with the names of `modules` below `NAME`. Lines keep their numbers and comments.

    Raises RenameError for a reference that would be wrong or lost.
    """
    lines = source.split("\n")
    tree = ast.parse(source)
    edits = [*_strings(tree, modules), *(edit for node in ast.walk(tree) for edit in _imports(node, modules))]
    for edit in sorted(edits, reverse=True):
        line = lines[edit.line - 1].encode()
        head, tail = line[: edit.column].decode(), line[edit.column :].decode()
        if not tail.startswith(edit.old):
            raise RenameError(f"{edit.line}: expected `{edit.old}` here")
        lines[edit.line - 1] = head + edit.new + tail.removeprefix(edit.old)
    return "\n".join(lines)


def _files(root: Path) -> list[Path]:
    """Return the files to install, relative to `root`."""
    found = sorted(path.relative_to(root) for name in PACKAGES for path in (root / name).rglob("*") if path.is_file())
    return [path for path in found if "__pycache__" not in path.parts and not path.is_relative_to(BUILD_ONLY)]


def write(root: Path, target: Path) -> None:
    """Write the package `NAME` into the folder `target`. Raises RenameError, with the file."""
    files = _files(root)
    dotted = (".".join(path.with_suffix("").parts) for path in files if path.suffix == ".py")
    modules = frozenset(name.removesuffix(".__init__") for name in dotted)
    (target / NAME).mkdir(parents=True)
    (target / NAME / "__init__.py").write_text('"""OpenChat. `openchat --help` lists its commands."""\n')
    for path in files:
        copy = target / NAME / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".py":
            shutil.copyfile(root / path, copy)
            continue
        try:
            copy.write_text(renamed((root / path).read_text(), modules))
        except RenameError as error:
            raise RenameError(f"{path}:{error}") from None


class OneName(BuildHookInterface):
    """Makes a wheel contain only the package `NAME`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Prepare a build; `version` is "standard" or "editable"."""
        if version == "editable":
            return
        self._folder = tempfile.mkdtemp(prefix="openchat-wheel-")
        write(Path(self.root), Path(self._folder))
        build_data["force_include"][f"{self._folder}/{NAME}"] = NAME
        build_data["force_include"] |= {str(Path(self.root) / source): to for source, to in DATA.items()}
        scripts = self.metadata.core.scripts
        scripts |= {name: f"{NAME}.{reference}" for name, reference in scripts.items()}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002 - the signature of the interface
        """Remove the copy after a build."""
        if version != "editable":
            shutil.rmtree(self._folder)
