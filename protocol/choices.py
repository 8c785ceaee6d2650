"""The allowed values of a field, for error messages."""

import functools
import re
from collections.abc import Iterable

from msgspec import inspect

_STEP = re.compile(r"\.(\w+)|\[[^\]]*\]")


@functools.lru_cache(maxsize=16)
def _known(kind: object) -> inspect.Type:
    return inspect.type_info(kind)


def choices(kind: object, path: str, *, tag: str | None) -> list[str]:
    """Return the allowed values of the field at a path, such as `.settings.history`, in a decoder's type. `tag` selects
    the type if `kind` is a union. The list is empty if the field has no closed list of values.
    """
    here = [
        one for one in _each([_known(kind)]) if not (isinstance(one, inspect.StructType) and one.tag not in {None, tag})
    ]
    found: list[str] = []
    for step in _STEP.finditer(path):
        found = [str(one.tag) for one in here if isinstance(one, inspect.StructType) and one.tag_field == step[1]]
        here = list(_each(_inside(here, step[1])))
    for one in here:
        if isinstance(one, inspect.LiteralType):
            found += [str(value) for value in one.values]
        elif isinstance(one, inspect.EnumType):
            found += [str(value.value) for value in one.cls]
    return list(dict.fromkeys(found))


def _inside(kinds: Iterable[inspect.Type], name: str | None) -> Iterable[inspect.Type]:
    """Yield the types of a field, or, without a name, of the elements."""
    for kind in kinds:
        if name is not None and isinstance(kind, inspect.StructType):
            yield from (field.type for field in kind.fields if field.encode_name == name)
        elif name is None and isinstance(kind, (inspect.ListType, inspect.SetType, inspect.VarTupleType)):
            yield kind.item_type
        elif name is None and isinstance(kind, inspect.DictType):
            yield kind.value_type


def _each(kinds: Iterable[inspect.Type]) -> Iterable[inspect.Type]:
    """Yield types, and the members of unions one by one."""
    for kind in kinds:
        if isinstance(kind, inspect.Metadata):
            yield from _each([kind.type])
        elif isinstance(kind, inspect.UnionType):
            yield from _each(kind.types)
        else:
            yield kind
