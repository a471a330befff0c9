"""Frozen dataclasses to JSON and back, strictly: what is read is exactly what could have been written."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any

_INFINITY = "infinity"  # JSON has no infinite number
_LATER = "later"


def later(default: Any) -> Any:
    """A dataclass field that files written before it existed do not have."""
    return dataclasses.field(default=default, metadata={_LATER: True})


def plain(record: Any) -> Any:
    """A dataclass as dictionaries, lists, strings, numbers, true, false and null.

    A field made by `later` is left out while it has its default, so that older files read and hash as before.
    """
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        values = {item: getattr(record, item.name) for item in dataclasses.fields(record)}
        return {
            item.name: plain(value)
            for item, value in values.items()
            if not (item.metadata.get(_LATER) and value == item.default)
        }
    if isinstance(record, (list, tuple)):
        return [plain(value) for value in record]
    if isinstance(record, dict):
        return {key: plain(value) for key, value in record.items()}
    return _INFINITY if isinstance(record, float) and math.isinf(record) else record


def loads(text: str) -> Any:
    """Parse JSON; a repeated key, NaN, an infinite number or too deep nesting is a ValueError."""
    try:
        return json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON (line {error.lineno}, column {error.colno})") from None


def decode(value: Any, kind: type) -> Any:
    """What :func:`loads` gave, as a `kind`; ValueError for missing, unknown or mistyped fields."""
    return _decode(value, kind, kind.__name__)


def check_types(record: Any) -> None:
    """ValueError unless each field has its declared type and no number is NaN or negative."""
    for name, hint in typing.get_type_hints(type(record)).items():
        _check(getattr(record, name), hint, name)


def _check(value: Any, hint: Any, name: str) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is not None:
            _check(value, arguments[0], name)
    elif origin is tuple:
        _require(isinstance(value, tuple), name, "a tuple")
        for item in value:
            _check(item, arguments[0], name)
    elif origin is dict:
        _require(isinstance(value, dict), name, "a dictionary")
        for key, item in value.items():
            _check(key, arguments[0], name)
            _check(item, arguments[1], name)
    elif hint in (int, float):
        right = isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
        _require(right and value >= 0, name, "a number of at least 0" if hint is float else "a whole number")
    else:
        _require(isinstance(value, hint), name, f"a {hint.__name__}")


def _decode(value: Any, hint: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _decode(value, arguments[0], name)
    if origin is tuple:
        _require(isinstance(value, list), name, "a list")
        return tuple(_decode(item, arguments[0], name) for item in value)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        _require(isinstance(value, dict), name, "an object")
        hints = typing.get_type_hints(hint)
        absent = {item.name for item in dataclasses.fields(hint) if item.metadata.get(_LATER)} - value.keys()
        if missing := sorted(hints.keys() - value.keys() - absent):
            raise ValueError(f"{name} lacks {', '.join(missing)}")
        if unknown := sorted(value.keys() - hints.keys()):
            raise ValueError(f"{name} has unknown {', '.join(map(repr, unknown))}")
        return hint(**{key: _decode(value[key], hints[key], key) for key in hints.keys() - absent})
    if hint is float:
        if value == _INFINITY:
            return math.inf
        _require(isinstance(value, (int, float)) and not isinstance(value, bool), name, "a number")
        return _finite(value)
    return value  # the dataclass itself checks the remaining types


def _require(condition: bool, name: str, what: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {what}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("has a repeated key")
    return result


def _no_constant(text: str) -> float:
    raise ValueError(f"contains {text}")


def _finite(number: Any) -> float:
    try:
        result = float(number)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ValueError("contains a number too large for a float")
    return result
