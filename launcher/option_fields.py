"""Fields of the option dataclasses: how options are declared, and the check of their types and ranges."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from functools import cache
from pathlib import PurePath
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from shardlaunch.errors import UserError

PathT = TypeVar("PathT", str, PurePath)
Mark = Literal["identity", "warn", "free"]
_BOUNDS = {
    "minimum": (lambda value, bound: value >= bound, "at least"),
    "above": (lambda value, bound: value > bound, "above"),
    "maximum": (lambda value, bound: value <= bound, "at most"),
    "below": (lambda value, bound: value < bound, "below"),
}
_SINGULAR = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
_PLURAL = {int: "whole numbers", float: "numbers", bool: "True or False", str: "texts"}


def option(
    default: Any,
    *,
    mark: Mark | None = None,
    group: str = "",
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    is_path: bool = False,
) -> Any:
    """Declare an option: its default, what a changed value means for a resume (`mark`), and its range.

    `mark` is `identity` (changes the run: a resume with another value is refused), `warn` (changes rounding only) or
    `free` (changes nothing). Options declared without this function are `identity`. A subclass that redeclares an
    option without this function, to change its default, keeps mark, group and range. `minimum` and `maximum` are
    inclusive, `above` and `below` exclusive; for a tuple, every value is checked, and a number with a range must be
    finite. In a text that `is_path`, as in an option of type Path, `~` is the home folder. `group` is the heading in
    `--help` (default: the recipe's own options). Returns a dataclass field.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    bounds = MappingProxyType({name: bound for name, bound in limits.items() if bound is not None})
    return field(default=default, metadata={"mark": mark, "group": group, "bounds": bounds, "is_path": is_path})


def flag(name: str) -> str:
    """Return an option's name on the command line."""
    return f"--{name.replace('_', '-')}"


def option_types(options_type: type) -> Mapping[str, Any]:
    """Return the type of each option, without `None`.

    A class that redeclares an option as plain `str` or `int`, to change its default, keeps the choices of its base.
    """
    key: Any = options_type  # a class; mypy considers it as unhashable as its instances
    return _types(key)


@cache
def _types(options_type: Any) -> Mapping[str, Any]:
    by_class = [_without_none(get_type_hints(owner)) for owner in options_type.__mro__ if is_dataclass(owner)]
    return {f.name: _narrowest([hints[f.name] for hints in by_class if f.name in hints]) for f in fields(options_type)}


def option_hints(options_type: type) -> Mapping[str, Any]:
    """Return the type of each option as it is declared, with `None` where that is allowed."""
    return get_type_hints(options_type)


def _narrowest(hints: Sequence[Any]) -> Any:
    mine = hints[0]
    wider = [hint for hint in hints if get_origin(hint) is Literal or (is_union(hint) and mine in get_args(hint))]
    return wider[0] if wider and mine in (str, int) else mine


def inherited(options_type: type, name: str, key: str, default: Any) -> Any:
    """Return an option's `mark`, `group` or `bounds` from its most derived declaration with option()."""
    for owner in options_type.__mro__:
        found = owner.__dict__.get("__dataclass_fields__", {}).get(name)
        if found is not None and found.metadata.get(key):
            return found.metadata[key]
    return default


def is_list(hint: Any) -> bool:
    """Return whether an option of this type takes several values."""
    return get_origin(hint) in (tuple, list)


def expected(hint: Any) -> str:
    """Describe the values of an option of this type, for error messages."""
    if get_origin(hint) is Literal:
        return f"{'one of ' * (len(get_args(hint)) > 1)}{', '.join(map(str, get_args(hint)))}"
    if is_union(hint):
        return ", or ".join(map(expected, get_args(hint)))
    if is_list(hint):
        inner = get_args(hint)
        count = "" if _has_any_length(hint) else f"{len(inner)} "
        if get_origin(inner[0]) is Literal:
            return f"values from {', '.join(map(str, get_args(inner[0])))}"
        return f"{count}{_PLURAL.get(inner[0], 'values')}"
    return _SINGULAR.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def check_values(options: Any) -> None:
    """Raise UserError for the first option with a value of the wrong type or out of range.

    Lists are converted to tuples, paths to strings, and integers to floats, where the option's type requires it.
    """
    for f in fields(options):
        value = getattr(options, f.name)
        if value is not None or not (f.default is None or _may_be_none(type(options), f.name)):
            setattr(options, f.name, check_value(type(options), f.name, value))


def check_value(options_type: type, name: str, value: Any) -> Any:
    """Return an option's value as its type has it. Raises UserError if it is of the wrong type or out of range."""
    hint = option_types(options_type)[name]
    value = _converted(value, hint)
    text = f"{flag(name)} {' '.join(map(str, value)) if isinstance(value, tuple | list) else value}"
    if not _is_of(value, hint):
        raise UserError(f"{text}: must be {expected(hint)}")
    if is_path(options_type, name):
        if isinstance(value, tuple | list):
            value = type(value)(expanded(one, flag(name)) for one in value)
        else:
            value = expanded(value, flag(name))
    _check_bounds(inherited(options_type, name, "bounds", {}), value, text)
    return value


def is_path(options_type: type, name: str) -> bool:
    """Return whether an option is a path, or several."""
    hint = option_types(options_type)[name]
    inner = get_args(hint)[0] if is_list(hint) and get_args(hint) else hint
    is_type = isinstance(inner, type) and issubclass(inner, PurePath)
    return is_type or bool(inherited(options_type, name, "is_path", False))


def expanded(path: PathT, called: str) -> PathT:
    """Return a path with the home folder for a `~` at its beginning. Raises UserError if there is no such folder.

    `called` is the option that a message names.
    """
    text = os.path.expanduser(path)
    if str(text).startswith("~"):
        raise UserError(f"{called} {path}: no home folder of that name; for a file whose name begins with ~ write ./~")
    return type(path)(text)


def _may_be_none(options_type: type, name: str) -> bool:
    """Return whether a class that declares an option, or a base of it, allows None: no value of the launcher's."""
    hints = [get_type_hints(owner).get(name) for owner in options_type.__mro__ if is_dataclass(owner)]
    return any(NoneType in get_args(hint) for hint in hints)


def _without_none(hints: Mapping[str, Any]) -> dict[str, Any]:
    plain = {}
    for name, hint in hints.items():
        arms = [arm for arm in get_args(hint) if arm is not NoneType]
        plain[name] = arms[0] if is_union(hint) and len(arms) == 1 else hint
    return plain


def _converted(value: Any, hint: Any) -> Any:
    if isinstance(value, list | tuple) and is_list(hint):
        kind = get_origin(hint)
        assert kind is not None
        return kind(_converted(one, get_args(hint)[0]) for one in value)
    if isinstance(value, os.PathLike) and hint is str:
        return os.fspath(value)
    if isinstance(value, str) and isinstance(hint, type) and issubclass(hint, PurePath):
        return hint(value)
    if type(value) is int and hint is float:
        return float(value)
    return value


def _is_of(value: Any, hint: Any) -> bool:
    """Return whether a value has an option's type. Types other than the basic ones are not checked."""
    if get_origin(hint) is Literal:
        return any(value == one and type(value) is type(one) for one in get_args(hint))
    if is_list(hint):
        inner = get_args(hint)
        kinds = (inner[0],) * len(value) if _has_any_length(hint) and isinstance(value, tuple | list) else inner
        is_whole = isinstance(value, tuple | list) and len(value) == len(kinds)
        return is_whole and all(_is_of(one, kind) for one, kind in zip(value, kinds, strict=True))
    if is_union(hint):
        return any(_is_of(value, arm) for arm in get_args(hint))
    if hint in _SINGULAR:
        return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    return True


def is_union(hint: Any) -> bool:
    """Return whether an option takes values of several types, such as a number or a word."""
    return get_origin(hint) in (Union, UnionType)


def _has_any_length(hint: Any) -> bool:
    return get_origin(hint) is list or Ellipsis in get_args(hint)


def _check_bounds(bounds: Mapping[str, float], value: Any, text: str) -> None:
    if isinstance(value, str):  # a word in place of a number
        return
    values = value if isinstance(value, tuple | list) else (value,)
    # `not all(in range)` rather than `any(out of range)`, so that NaN is refused too.
    if not all(_BOUNDS[name][0](one, bound) for name, bound in bounds.items() for one in values):
        limits = " and ".join(f"{_BOUNDS[name][1]} {bound}" for name, bound in bounds.items())
        raise UserError(f"{text}: {'each value ' if isinstance(value, tuple | list) else ''}must be {limits}")
    if bounds and math.inf not in map(abs, bounds.values()) and not all(map(math.isfinite, values)):
        raise UserError(f"{text}: must be a finite number")
