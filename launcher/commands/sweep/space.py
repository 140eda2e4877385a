"""The space of a sweep: which options are searched, over which values, each checked against the recipe's options."""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from shardlaunch.errors import UserError, printable
from shardlaunch.launcher.command_line.options_file import Key, read_mapping
from shardlaunch.launcher.command_line.other_trainers import advice
from shardlaunch.launcher.command_line.parsing import option_value
from shardlaunch.launcher.option_fields import flag, is_list, option_types
from shardlaunch.launcher.options import Options, ReportingOptions, SavingOptions

Value = float | int | str
SPEED_ONLY = frozenset(
    (
        *("strategy", "layer_classes", "reshard_after_forward", "cpu_offload", "shard_ranks", "tensor_parallel"),
        *("threads_per_rank", "num_workers", "compile", "gradient_checkpointing", "eval_micro_batch_size"),
    )
)
"""Options that change how fast a trial is, not what it finds."""
ASIDE = frozenset(
    (
        *(field.name for owner in (SavingOptions, ReportingOptions) for field in fields(owner)),
        *("preset", "config", "output_dir", "run_name", "resume", "stop_at_step", "extend_to_steps", "max_time"),
        *("grace_s", "callback", "hang_after_s", "check", "debug", "on_nonfinite", "on_spike"),
    )
)
"""Options about a run from outside. `folds` and `seed` decide how a trial is judged, and are the same for all."""
MOST_VALUES = 1000
"""Of a range, of which a grid tries each."""
_HOW_JUDGED = ("folds", "seed")
_KEYS = ("low", "high", "log", "step")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """An option that is searched: a range of numbers, or choices."""

    name: str
    """With underscores."""
    choices: tuple[str, ...] = ()
    """Each as its words on a command line; empty for a range."""
    low: float = 0
    high: float = 0
    is_log: bool = False
    step: float | None = None
    is_int: bool = False

    def described(self) -> str:
        """Return the values as text; that of another range is another one."""
        if self.choices:
            return " | ".join(self.choices)
        low, high, step = (self._number(one) if one is not None else None for one in (self.low, self.high, self.step))
        kind = "whole numbers " * self.is_int
        return f"{kind}{low} to {high}{f' in steps of {step}' * (step is not None)}{', log' * self.is_log}"

    def _number(self, value: float) -> str:
        return str(int(value)) if self.is_int else repr(float(value))

    def words(self, value: Value, options_type: type[Options]) -> list[str]:
        """Return a value as words of a command line."""
        hint = option_types(options_type)[self.name]
        if not self.choices:
            return [f"{flag(self.name)}={self._number(float(value))}"]
        if hint is bool:
            return [flag(self.name if value == "true" else f"no_{self.name}")]
        texts = shlex.split(str(value))
        return [f"{flag(self.name)}={texts[0]}"] if len(texts) == 1 and not is_list(hint) else [flag(self.name), *texts]


def read_space(path: Path, options_type: type[Options], fixed: frozenset[str]) -> dict[str, Parameter]:
    """Return what a YAML file says is to be searched, by option name. `fixed` names the options after ` -- `.

    Raises UserError with all that is wrong in the file, one line each.
    """
    where = f"--space {path}"
    known = option_types(options_type)
    found, problems = {}, []
    for key, node in read_mapping(path, "--space"):
        try:
            if key.name not in known:
                raise UserError(f"{key.text}: {advice(key.name, known)}")
            _check_name(key, fixed)
            found[key.name] = _parameter(key.name, node, options_type)
        except UserError as error:
            problems.append(f"{where}: {error} (line {key.line})")
    if not found and not problems:
        problems = [f"{where}: names no option; write for example lr: {{low: 1e-5, high: 1e-3, log: true}}"]
    if problems:
        raise UserError("\n".join(problems))
    return found


def _check_name(key: Key, fixed: frozenset[str]) -> None:
    """Raise UserError for an option that is not to be searched."""
    if key.name in SPEED_ONLY:
        raise UserError(f"{key.text}: changes the speed of a trial, not its result; set it for all after ` -- `")
    if key.name in ASIDE:
        raise UserError(f"{key.text}: cannot be searched: it does not change what a trial finds")
    if key.name in _HOW_JUDGED:
        raise UserError(f"{key.text}: must be the same for all trials, to compare them; set it after ` -- `")
    if key.name in fixed:
        raise UserError(f"{key.text}: is also set after ` -- `, or in its --config; remove one of the two")


def _parameter(name: str, node: Any, options_type: type[Options]) -> Parameter:
    from ruamel.yaml.nodes import MappingNode, SequenceNode

    if isinstance(node, SequenceNode):
        return _choices(name, node, options_type)
    if isinstance(node, MappingNode):
        return _range(name, node, options_type)
    shown = printable(str(node.value), is_name=True)
    raise UserError(
        f"{flag(name)} {shown}: one value is no search; write a list of values or a range, or set it after ` -- `"
    )


def _choices(name: str, node: Any, options_type: type[Options]) -> Parameter:
    choices, values = [], []
    for item in node.value:
        texts = _texts(name, item)
        values.append(option_value(options_type, name, texts))
        # A switch is written in one way, whichever way it stands in the file.
        choices.append(texts[0].lower() if isinstance(values[-1], bool) else shlex.join(texts))
    if len(choices) < 2:
        raise UserError(f"{flag(name)}: a search needs at least two values; set one value after ` -- `")
    for number, value in enumerate(values):
        if value in values[:number]:
            raise UserError(f"{flag(name)}: {choices[number]} is there twice; remove one of them")
    return Parameter(name=name, choices=tuple(choices))


def _texts(name: str, node: Any) -> list[str]:
    """Return the words of a choice: a value, or a list of them for an option that takes several."""
    items = node.value if isinstance(node.value, list) else [node]
    if not all(isinstance(item.value, str) for item in items):
        raise UserError(f"{flag(name)}: a value in the list must be one value, or a list of them")
    return [item.value for item in items]


def _range(name: str, node: Any, options_type: type[Options]) -> Parameter:
    hint = option_types(options_type)[name]
    if hint not in (int, float):
        raise UserError(f"{flag(name)}: is no number, and takes a list of values instead of a range")
    given: dict[str, str] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key not in _KEYS:
            near = get_close_matches(key, _KEYS, n=1) or [{"min": "low", "max": "high", "q": "step"}.get(key, "")]
            advice = f"; did you mean {near[0]}?" if near[0] else f"; it has {', '.join(_KEYS)}"
            raise UserError(f"{flag(name)}: {printable(key, is_name=True)} is no key of a range{advice}")
        if not isinstance(value_node.value, str):
            raise UserError(f"{flag(name)}: {key} must be one value")
        if key in given:
            raise UserError(f"{flag(name)}: {key} is there twice; remove one of them")
        given[key] = value_node.value
    if missing := [key for key in ("low", "high") if key not in given]:
        raise UserError(f"{flag(name)}: a range needs {' and '.join(missing)}")
    low, high = (option_value(options_type, name, [given[key]]) for key in ("low", "high"))
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{flag(name)}: low {given['low']} must be below high {given['high']}")
    if given.get("log", "false").lower() not in ("true", "false"):
        raise UserError(f"{flag(name)}: log {given['log']}: must be true or false")
    is_log = given.get("log", "false").lower() == "true"
    if is_log and low <= 0:
        raise UserError(f"{flag(name)}: a logarithmic range must begin above 0, not at {given['low']}")
    if is_log and "step" in given:
        raise UserError(f"{flag(name)}: a logarithmic range has no step; remove one of the two")
    step = _step(name, given, is_int=hint is int)
    return Parameter(name=name, low=low, high=high, is_log=is_log, step=step, is_int=hint is int)


def _step(name: str, given: Mapping[str, str], *, is_int: bool) -> float | None:
    if "step" not in given:
        return None
    try:
        step, low, high = (Decimal(given[key].replace("_", "")) for key in ("step", "low", "high"))
    except InvalidOperation:
        raise UserError(f"{flag(name)}: step {given['step']}: must be a number") from None
    if not step.is_finite() or step <= 0 or (is_int and step != step.to_integral_value()):
        raise UserError(f"{flag(name)}: step {given['step']}: must be a {'whole ' * is_int}number above 0")
    if (high - low) % step:
        largest = low + (high - low) // step * step
        raise UserError(
            f"{flag(name)}: steps of {given['step']} from {given['low']} do not meet high {given['high']}; the largest "
            f"value would be {largest}"
        )
    return float(step)


def grid(space: Mapping[str, Parameter]) -> dict[str, Sequence[Value]]:
    """Return all values of each option, for a search of all combinations. Raises UserError where there is no end."""
    ranges = [one for one in space.values() if not one.choices]
    endless = [one for one in ranges if one.is_log or (not one.is_int and one.step is None)]
    endless += [one for one in ranges if one not in endless and (one.high - one.low) / (one.step or 1) > MOST_VALUES]
    if endless:
        names = ", ".join(flag(one.name) for one in endless)
        raise UserError(f"--sampler grid: {names}: too many values to try each; give a list of values, or a step")
    return {name: list(_values(one)) for name, one in space.items()}


def _values(parameter: Parameter) -> Iterator[Value]:
    if parameter.choices:
        yield from parameter.choices
        return
    step = Decimal(str(parameter.step or 1))
    low, high = Decimal(str(parameter.low)), Decimal(str(parameter.high))
    for number in range(int((high - low) / step) + 1):
        value = low + number * step
        yield int(value) if parameter.is_int else float(value)
