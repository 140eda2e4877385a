"""`--help` of a recipe: its options under headings, described by the docstrings of their fields."""

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import fields, make_dataclass
from itertools import pairwise
from typing import Annotated, Any, get_type_hints

import tyro

from shardlaunch.launcher.option_fields import inherited
from shardlaunch.launcher.options import GROUPS, Options


def show_help(default: Options, *, program: str, description: str) -> None:
    """Print the options of `default`'s class with its values as defaults, the recipe's own options first."""
    options_type = type(default)
    hints, texts = get_type_hints(options_type), help_texts(options_type)
    groups = []
    own = program.removesuffix(".py")
    for group, names in grouped(options_type, own=own if own.isidentifier() else "recipe").items():
        members = [(name, _described(hints[name], texts.get(name, ""), getattr(default, name))) for name in names]
        values = {name: getattr(default, name) for name in names}
        group_type: Any = make_dataclass(group, members, kw_only=True)
        marked: Any = tyro.conf.OmitArgPrefixes
        groups.append((group, marked[group_type], group_type(**values)))
    root = make_dataclass("Groups", [(name, kind) for name, kind, _ in groups], kw_only=True)
    tyro.cli(
        root,
        prog=program,
        description=description,
        default=root(**{name: value for name, _, value in groups}),
        args=["--help"],
    )


def grouped(options_type: type[Options], *, own: str) -> Mapping[str, list[str]]:
    """Return option names by heading: first `own` (the recipe's), then the recipe's other groups, then the launcher's.

    An option that a recipe redeclares, to change its default, keeps its heading.
    """
    places = {f.name: group for group, owner in GROUPS.items() for f in fields(owner)}
    chosen = {f.name: inherited(options_type, f.name, "group", "") for f in fields(options_type)}
    groups: dict[str, list[str]] = {own: []}
    # Options moved to another heading come after those that belong there.
    for name in sorted(chosen, key=lambda name: name not in places or bool(chosen[name])):
        groups.setdefault(chosen[name] or places.get(name, own), []).append(name)
    order = [own, *(group for group in groups if group not in GROUPS and group != own), *GROUPS]
    return {group: groups[group] for group in order if groups.get(group)}


def help_texts(options_type: type) -> Mapping[str, str]:
    """Return the docstring of each field, from the most derived class that has one."""
    texts: dict[str, str] = {}
    for owner in reversed(options_type.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(owner))
        except (OSError, TypeError):  # a built-in class, or one typed into an interpreter
            continue
        body = ast.parse(source).body[0]
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for statement, following in pairwise(statements):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                texts[statement.target.id] = " ".join(following.value.value.split())
    return texts


def _described(hint: Any, text: str, default: Any) -> Any:
    """Return an option's type with its help text. Empty defaults are not shown."""
    hides_default = default in ("", (), None)
    return Annotated[hint, tyro.conf.arg(help=text, help_behavior_hint="" if hides_default else None)]
