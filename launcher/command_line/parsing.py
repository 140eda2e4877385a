"""Parse options from the command line, YAML files, presets and keyword arguments, all by the same rules."""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_origin, get_type_hints

from shardlaunch.errors import UserError
from shardlaunch.launcher.command_line.other_trainers import advice
from shardlaunch.launcher.optimization.optimizers import for_its_optimizer
from shardlaunch.launcher.option_fields import (
    check_value,
    expanded,
    expected,
    flag,
    is_list,
    is_path,
    is_union,
    option_hints,
    option_types,
)
from shardlaunch.launcher.options import Options

if TYPE_CHECKING:
    from shardlaunch.launcher.command_line.options_file import Given

OptionsT = TypeVar("OptionsT", bound=Options)
_HELP = ("-h", "--help")
_ADDED_UP = ("callback",)


def parse_options(
    options_type: type[OptionsT],
    presets: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str],
    *,
    program: str,
    description: str,
    show: bool = True,
) -> OptionsT:
    """Return the options: class defaults, overridden by the preset, the YAML file and the command line, in this order.

    `show` is False on ranks that print nothing. Raises UserError for unknown options and invalid values, and SystemExit
    after --help, which shows the preset's defaults.
    """
    keywords = _typed_words(options_type, [word for word in argv if word not in _HELP])
    if not any(word in _HELP for word in argv):
        return options_from_keywords(options_type, presets, keywords)
    if show:
        from shardlaunch.launcher.command_line.help import show_help

        preset = keywords.get("preset") or _config(options_type, keywords)[0].get("preset", "")
        default = _defaults(options_type, presets, preset)
        if presets:
            description = f"{description}\n\nPresets (--preset): {', '.join(presets)}"
        show_help(default, program=program, description=description)
    raise SystemExit(0)


def options_from_keywords(
    options_type: type[OptionsT],
    presets: Mapping[str, Mapping[str, Any]],
    keywords: Mapping[str, Any],
    *,
    base: OptionsT | None = None,
) -> OptionsT:
    """Return the options of `base`, or of class, preset and YAML file if there is no base, overridden by `keywords`.

    Raises UserError for unknown options and invalid values.
    """
    known = option_types(options_type)
    _refuse([f"{name}: {advice(name, known)}" for name in keywords if name not in known])
    config: Mapping[str, Any] = {}
    origins: dict[str, str] = {}
    explicitly_set = frozenset(keywords)
    if base is None:
        config, origins = _config(options_type, keywords)
        origins = {name: place for name, place in origins.items() if name not in keywords}
        default = _defaults(options_type, presets, keywords.get("preset") or config.get("preset", ""))
        explicitly_set |= frozenset(config)
    elif "preset" in keywords or "config" in keywords:
        raise UserError("preset and config need a recipe class; a recipe instance already has its options")
    else:
        default = base
        origins = {name: place for name, place in base.origins.items() if name not in keywords}
        explicitly_set |= base.explicitly_set
    with naming_origins(origins):
        if isinstance(keywords.get("data"), list | tuple):
            keywords = {**keywords, "data": shlex.join(map(str, keywords["data"]))}
        options = replace(default, **{**config, **keywords})
        options = for_its_optimizer(options, default, explicitly_set=explicitly_set)
    options.explicitly_set = explicitly_set
    options.origins = origins
    return options


@contextmanager
def naming_origins(origins: Mapping[str, str]) -> Iterator[None]:
    """Let a UserError say where in a file those of its options stand that come from one. `origins`: places by name."""
    try:
        yield
    except UserError as error:
        flags = re.findall(r"--[a-z0-9-]+", str(error))
        places = {one: origins[name] for one in flags if (name := one[2:].replace("-", "_")) in origins}
        if not places or "--config" in flags:
            raise
        raise UserError(f"{error} ({'; '.join(f'{one}: {place}' for one, place in places.items())})") from error


def _defaults(options_type: type[OptionsT], presets: Mapping[str, Mapping[str, Any]], preset: str) -> OptionsT:
    """Return the default options of a class, with those of a preset unless `preset` is empty."""
    try:
        default = options_type()
    except TypeError as error:
        raise UserError(f"{options_type.__name__}: every option needs a default value ({error})") from error
    if not preset:
        return default
    if preset not in presets:
        choices = f"choose one of {', '.join(presets)}" if presets else "this recipe has none"
        raise UserError(f"--preset {preset}: unknown; {choices}")
    known = option_types(options_type)
    _refuse([f"--preset {preset}: {name}: {advice(name, known)}" for name in presets[preset] if name not in known])
    return replace(default, **presets[preset])


def _typed_words(options_type: type[Options], words: Sequence[str]) -> dict[str, Any]:
    """Return the values on a command line (`--name value`, `--name=value`, `--name`, `--no-name`) by option name.

    Hyphens and underscores are equivalent. An option takes all words up to the next that begins with two hyphens; of a
    repeated option, the last occurrence counts, but for those that add up.
    """
    hints = option_types(options_type)
    found: dict[str, tuple[bool, list[str]]] = {}
    unknown = []
    values: list[str] | None = None
    for word in words:
        if not word.startswith("--"):
            if values is None:
                raise UserError(f"{word}: not an option; options begin with two hyphens, as in --epochs 3")
            values.append(word)
            continue
        spelled, has_value, value = word.partition("=")
        name = spelled[2:].replace("-", "_")
        is_off = name not in hints and hints.get(name.removeprefix("no_")) is bool
        values = [value] if has_value else []
        if name not in hints and not is_off:
            unknown.append(f"{spelled}: {advice(name, hints)}")
        else:
            if name in _ADDED_UP and name in found:
                found[name][1].extend(values)
                values = found[name][1]
            found[name.removeprefix("no_") if is_off else name] = (not is_off, values)
    _refuse(unknown)
    typed: dict[str, Any] = {}
    for name, (is_on, texts) in found.items():
        if hints[name] is bool:
            if texts:
                raise UserError(
                    f"{flag(name)} {' '.join(texts)}: takes no value; turn it off with {flag(f'no_{name}')}"
                )
            typed[name] = is_on
        else:
            typed[name] = _value(options_type, name, _one_text(name, texts))
    return typed


def _one_text(name: str, texts: Sequence[str]) -> Sequence[str]:
    """Return several paths of --data, as a shell makes them of a pattern, as one text."""
    return [shlex.join(texts)] if name == "data" and len(texts) > 1 else texts


def _config(options_type: type[Options], keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values in the YAML file of --config, checked as on the command line, and where each of them stands.

    Both are empty if there is no file.
    """
    if not keywords.get("config"):
        return {}, {}
    from shardlaunch.launcher.command_line.options_file import read_options_file  # not needed without a file

    path = Path(expanded(str(keywords["config"]), "--config"))
    where = f"--config {path}"
    given = read_options_file(path)
    hints = option_types(options_type)
    unknown = [(name, one) for name, one in given.items() if name not in hints]
    _refuse([f"{where}: {one.key}: {advice(name, hints)} (line {one.line})" for name, one in unknown])
    typed: dict[str, Any] = {}
    for name, one in given.items():
        try:
            if not one.is_null:
                typed[name] = _value_of_file(options_type, name, one)
            elif hints[name] is not option_hints(options_type)[name]:  # it may be None
                typed[name] = None
        except UserError as error:
            raise UserError(f"{where}: {error} (line {one.line})") from error
    return typed, {name: f"line {given[name].line} of {path}" for name in typed}


def _value_of_file(options_type: type[Options], name: str, given: "Given") -> Any:
    """Return an option's value from a file. Raises UserError that names the option."""
    hint = option_types(options_type)[name]
    if name == "config":
        raise UserError(f"an options file cannot include another; remove {given.key!r}")
    if given.problem:
        raise UserError(f"option {given.key!r} {given.problem}")
    if given.is_list != is_list(hint) and name != "data":
        wanted = "a list of values" if is_list(hint) else "a single value"
        raise UserError(f"option {given.key!r} takes {wanted}, not {given.shown!r}")
    if hint is bool and given.switch is not None:
        return given.switch
    takes_words = is_list(hint) or hint is str or get_origin(hint) is Literal
    if hint is bool or (given.switch is not None and not takes_words):
        raise UserError(f"option {given.key!r} cannot be {given.shown}; it must be {expected(hint)}")
    if given.texts == ("~",) and is_path(options_type, name):
        raise UserError(f"option {given.key!r}: a bare ~ means nothing in YAML; write ~/ for your home folder")
    texts = given.texts if hint is str else [_NON_FINITE.get(text.lower(), text) for text in given.texts]
    return check_value(options_type, name, _value(options_type, name, _one_text(name, texts)))


# As YAML writes them, and as numbers are written on the command line.
_NON_FINITE = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


def option_value(options_type: type[Options], name: str, texts: Sequence[str]) -> Any:
    """Return an option's value from its words, as on the command line. Raises UserError that names the option."""
    if option_types(options_type)[name] is bool:
        switch = _SWITCH.get(" ".join(texts).lower())
        if switch is None:
            raise UserError(f"{flag(name)} {' '.join(texts)}: must be true or false")
        return switch
    return check_value(options_type, name, _value(options_type, name, _one_text(name, texts)))


_SWITCH = {"true": True, "false": False}


def _value(options_type: type[Options], name: str, texts: Sequence[str], *, where: str = "") -> Any:
    """Return an option's value, parsed from its words by tyro's rule for its type."""
    key: Any = options_type
    spec = _rule(key, name)
    counts = (spec.nargs,) if isinstance(spec.nargs, int) else spec.nargs
    wanted = expected(option_types(options_type)[name])
    if not texts and counts != "*":
        raise UserError(f"{where}{flag(name)}: its value is missing; it must be {wanted}")
    if counts == (1,) and len(texts) > 1:
        raise UserError(f"{where}{flag(name)}: takes one value, not {len(texts)}: {' '.join(texts)}")
    problem = UserError(f"{where}{flag(name)} {' '.join(texts)}: must be {wanted}")
    if (counts != "*" and len(texts) not in counts) or not set(texts) <= set(spec.choices or texts):
        raise problem
    try:
        return spec.instance_from_str(list(texts))
    except ValueError:
        raise problem from None


@cache
def _rule(options_type: Any, name: str) -> Any:
    # Imported here, because a run without command-line options does not need it.
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    hint = get_type_hints(options_type)[name]
    if is_union(option_types(options_type)[name]):
        hint = option_types(options_type)[name]
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(hint, set()))
    if not isinstance(spec, PrimitiveConstructorSpec):
        raise UserError(f"{flag(name)}: an option cannot be of type {hint}; choose a plain type or a tuple of them")
    return spec


def _refuse(problems: Iterable[str]) -> None:
    """Raise UserError if there are problems, with one line per problem."""
    text = "\n".join(problems)
    if text:
        raise UserError(text)
