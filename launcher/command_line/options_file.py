"""Read the YAML file of --config: which option has which text, in which line.

YAML 1.2. Nothing is made of a value here: the option's own type does that, by the rules of the command line. So
`2024_11_25`, `010` and `no` are what they look like, and a text option takes them as they are written.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shardlaunch.checkpoints.records import read_bytes
from shardlaunch.errors import UserError, printable

MOST_BYTES = 256 << 10
_TAG = "tag:yaml.org,2002:"
_TAGS = ("str", "int", "float", "bool", "null", "timestamp", "merge", "value")
_NULL = ("null", "Null", "NULL")
# YAML 1.1 has the last four of each, and many files do.
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Given(NamedTuple):
    """Value of an option in a file."""

    key: str
    """As it is written."""
    line: int
    texts: tuple[str, ...]
    is_list: bool = False
    is_null: bool = False
    """`null`: as if the option were not written."""
    switch: bool | None = None
    """Value of a word that turns an option on or off, written without quotes."""
    problem: str = ""
    """Why no option can have such a value."""

    @property
    def shown(self) -> str:
        """Return the value for a message."""
        if self.switch is not None and self.texts[0].lower() in ("true", "false"):
            return str(self.switch)
        return printable(f"[{', '.join(self.texts)}]" if self.is_list else self.texts[0], is_name=True)


def read_options_file(path: Path) -> dict[str, Given]:
    """Return the values of a YAML file by option name (with underscores). Raises UserError that names file and line."""
    return {key.name: _given(key.text, key.line, node) for key, node in read_mapping(path, "--config")}


class Key(NamedTuple):
    """Key of a mapping in a file."""

    text: str
    """As it is written."""
    line: int

    @property
    def name(self) -> str:
        """Return the option's name, with underscores."""
        return self.text.replace("-", "_")


def read_mapping(path: Path, option: str) -> list[tuple[Key, Any]]:
    """Return keys and nodes of the mapping in a YAML file, which `option` names; no key stands there twice.

    Raises UserError that names file and line.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError
    from ruamel.yaml.nodes import MappingNode

    where = f"{option} {path}"
    try:
        data = read_bytes(path, most_bytes=MOST_BYTES, follows_links=True)
    except UserError as error:
        raise UserError(f"{option} {error}") from error
    try:
        yaml = YAML(typ="safe", pure=True)
        yaml.composer.warn_double_anchors = False  # an anchor may be defined anew
        root = yaml.compose(data)
    except RecursionError:
        raise UserError(f"{where}: not valid YAML: it is nested too deeply") from None
    except (YAMLError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {_reason(error)}") from error
    if root is None or root.value == "":
        return []
    if not isinstance(root, MappingNode):
        raise UserError(f"{where}: must be a mapping of option names to values")
    found: dict[str, Key] = {}
    for key_node, _ in root.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node.value, str) or not key_node.value:
            raise UserError(f"{where}: line {line}: an option's name must be a word")
        key = Key(key_node.value, line)
        if key.name in found:
            first = found[key.name].line
            raise UserError(f"{where}: {key.text}: is set in line {first} and in line {line}; remove one of them")
        found[key.name] = key
    return list(zip(found.values(), (node for _, node in root.value), strict=True))


def _given(key: str, line: int, node: Any) -> Given:
    from ruamel.yaml.nodes import MappingNode, SequenceNode

    is_list = isinstance(node, SequenceNode)
    scalars: Sequence[Any] = node.value if is_list else [node]
    problems = [problem for scalar in scalars if (problem := _problem(scalar, is_item=is_list))]
    if isinstance(node, MappingNode):
        problems = ["takes a single value or a list, not a mapping"]
    if problems:
        return Given(key, line, (), problem=problems[0])
    texts = tuple(scalar.value for scalar in scalars)
    if is_list or node.style is not None:
        return Given(key, line, texts, is_list=is_list)
    return Given(key, line, texts, is_null=texts[0] in _NULL, switch=_SWITCHES.get(texts[0].lower()))


def _problem(node: Any, *, is_item: bool) -> str:
    """Return why a node is not the text of a value, or an empty string."""
    if not isinstance(node.value, str):
        return "takes a list of values, not of lists or mappings" if is_item else ""
    tag = str(node.tag)
    if tag.removeprefix(_TAG) not in _TAGS:
        return f"cannot have the tag {tag}; remove it"
    if not node.value and node.style is None:
        return 'has no value; remove it for its default, or write "" for an empty text'
    return ""


def _reason(error: Exception) -> str:
    return " ".join(str(error).replace(' in "<byte string>"', "").split())
