"""What data of a file may be: JSON whose fields have a type and bounds, checked before anything is made of it.

A reader is a function of a value and of the place where it stands; it returns what the value means, or raises
`SchemaError`. The fields of a dataclass name theirs (`checked`), and `read_as` reads the dataclass. Values are never
converted: `2.0` is no integer, `1` no bool.
ensures: nothing that a reader returns is an object of a class that the file names, and no name among it is code.
"""

from __future__ import annotations

import base64
import json
import keyword
import math
from collections.abc import Callable, Collection
from dataclasses import field, fields
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
Reader: TypeAlias = Callable[[Any, str], Any]

#: containers within containers
DEPTH = 100
#: values in a text of JSON, which need some forty times as many bytes
VALUES = 2_000_000
#: characters of a name
NAME = 1000
#: characters of a sentence
SENTENCE = 20_000
LARGEST = 2**63 - 1
#: a message quotes so many characters of a value
QUOTED = 60


class SchemaError(ValueError):
    """A value that the schema does not allow; each kind of file raises its own error for it."""


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text: no duplicate keys, bounded nesting and number of values."""
    if not isinstance(text, str):
        raise SchemaError(f"it is a {type(text).__name__}, not a text")
    if text.count(",") + text.count("[") + text.count("{") > VALUES:
        raise SchemaError(f"it has more than {VALUES:,} values")
    try:
        data = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise SchemaError(f"it is nested more than {DEPTH} deep") from None
    except SchemaError:
        raise
    except ValueError as error:  # its message may be of many pages
        raise SchemaError(f"it is no JSON: {str(error)[:SENTENCE]}") from None
    check_depth(data)
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise SchemaError(f"{quoted(max(names, key=names.count))} stands in it twice")
    return found


def check_depth(data: Any) -> None:
    """Refuses what is nested deeper than `DEPTH`."""
    level = [data]
    for _ in range(DEPTH + 1):
        level = [
            item
            for value in level
            if isinstance(value, (dict, list, tuple))
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise SchemaError(f"it is nested more than {DEPTH} deep")


def quoted(value: Any) -> str:
    """Returns a value for a message: short, and on one line."""
    text = ascii(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}…"


def refuse(value: Any, where: str, wanted: str) -> SchemaError:
    """Returns the error about a value."""
    return SchemaError(f"{where} is {quoted(value)}, not {wanted}")


def integer(low: int = 0, high: int = LARGEST) -> Reader:
    """Reads a whole number from `low` to `high`."""

    def read(value: Any, where: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise refuse(value, where, f"a whole number from {low} to {'2^63' if high == LARGEST else high}")
        return value

    return read


def real(low: float = -math.inf, high: float = math.inf, finite: bool = True) -> Reader:
    """Reads a number; without `finite` infinities and NaN too."""

    def read(value: Any, where: str) -> float:
        bounded = abs(value) <= LARGEST if type(value) is int else type(value) is float
        if not bounded or (math.isfinite(value) and not low <= value <= high) or (finite and not math.isfinite(value)):
            wanted = "a number" if not finite else "a finite number"
            raise refuse(value, where, wanted if low == -math.inf else f"a number from {low} to {high}")
        return value  # type: ignore[no-any-return]

    return read


def boolean(value: Any, where: str) -> bool:
    """Reads true or false."""
    if type(value) is not bool:
        raise refuse(value, where, "true or false")
    return value


def string(longest: int = SENTENCE, choices: Collection[str] | None = None) -> Reader:
    """Reads a text, or one of several."""

    def read(value: Any, where: str) -> str:
        if type(value) is not str or len(value) > longest or any("\ud800" <= c <= "\udfff" for c in value):
            raise refuse(value, where, f"a text of up to {longest} characters")
        if choices is not None and value not in choices:
            raise refuse(value, where, f"one of {', '.join(choices)}")
        return value

    return read


def name(value: Any, where: str) -> str:
    """Reads a name of a module, tensor or function: printable, on one line."""
    if type(value) is not str or len(value) > NAME or not value.isprintable():
        raise refuse(value, where, f"a name of up to {NAME} printable characters")
    return value


def identifier(value: Any, where: str) -> str:
    """Reads a name that code may have for an argument or an attribute."""
    if not name(value, where).isidentifier() or value.startswith("__") or keyword.iskeyword(value):
        raise refuse(value, where, "the name of an argument or attribute")
    return value  # type: ignore[no-any-return]


def optional(reader: Reader) -> Reader:
    """Reads null, or what another reader reads."""
    return lambda value, where: None if value is None else reader(value, where)


def either(*readers: Reader) -> Reader:
    """Reads what the first reader takes that takes it."""

    def read(value: Any, where: str) -> Any:
        for reader in readers[:-1]:
            try:
                return reader(value, where)
            except SchemaError:
                pass
        return readers[-1](value, where)

    return read


def array(reader: Reader, *rest: Reader, longest: int = VALUES) -> Reader:
    """Reads a list as a tuple: of any length up to `longest`, or with `rest` of one reader per item."""

    def read(value: Any, where: str) -> tuple[Any, ...]:
        if type(value) not in (list, tuple) or len(value) > longest or (rest and len(value) != len(rest) + 1):
            raise refuse(value, where, f"a list of {len(rest) + 1}" if rest else f"a list of up to {longest}")
        readers = (reader, *rest) if rest else (reader,) * len(value)
        return tuple(r(item, f"{where}[{i}]") for i, (r, item) in enumerate(zip(readers, value, strict=True)))

    return read


def mapping(reader: Reader, key: Reader = name) -> Reader:
    """Reads a JSON object with any keys that `key` takes."""

    def read(value: Any, where: str) -> dict[str, Any]:
        if type(value) is not dict:
            raise refuse(value, where, "a JSON object")
        return {key(k, f"a key of {where}"): reader(v, f"{where}[{quoted(k)}]") for k, v in value.items()}

    return read


def encoded_bytes(value: Any, where: str) -> bytes:
    """Reads base64."""
    try:
        return base64.b64decode(string(LARGEST)(value, where), validate=True)
    except (ValueError, TypeError):
        raise refuse(value, where, "base64") from None


def anything(value: Any, where: str) -> Any:
    """Leaves a value to another check."""
    return value


def checked(reader: Reader, required: bool = True, **options: Any) -> Any:
    """Returns a field of a dataclass with a reader; `options` are those of `dataclasses.field`.

    A file without a field that is not `required` gives it its default: one that older files lack.
    """
    return field(metadata={"reader": reader, "required": required}, **options)


def read_fields(cls: type[Any], value: Any, where: str, others: Collection[str] = ()) -> dict[str, Any]:
    """Reads the checked fields of a dataclass from a JSON object, which has `others` besides."""
    if type(value) is not dict:
        raise refuse(value, where, "a JSON object")
    found = {f.name: f.metadata for f in fields(cls) if "reader" in f.metadata}
    if unknown := value.keys() - found.keys() - set(others):
        raise SchemaError(f"{where} has {quoted(min(unknown))}, which is no field of it")
    needed = {key for key, metadata in found.items() if metadata["required"]} | set(others)
    if missing := needed - value.keys():
        raise SchemaError(f"{where} has no {min(missing)!r}")
    return {key: m["reader"](value[key], f"{where}.{key}") for key, m in found.items() if key in value}


def read_as(cls: type[T]) -> Callable[[Any, str], T]:
    """Reads a dataclass by its checked fields."""
    return lambda value, where: cls(**read_fields(cls, value, where))
