"""Options declared as dataclass fields: one definition for the command line, its help and a YAML file.

    @dataclass
    class Options:
        batch_size: int = option(16, "images per step and device", POSITIVE)

`add_arguments` adds `--batch-size N` to a parser, `read_config` accepts `batch_size: 32` or `batch-size: 32` in a file,
and `check_values` refuses 0 from either. `transformers.HfArgumentParser` reads dataclasses as well, but its flags
consume the next word, its lists have no fixed length, its help shows "(default: None)", and its YAML reader checks no
types.

Imports only the standard library and PyYAML: `--help` and a wrong option do not wait for PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from fastvit.errors import InputError


@dataclasses.dataclass(frozen=True)
class Expected:
    """The values that an option accepts, in words for the error message and as a predicate."""

    words: str
    accepts: Callable[[Any], bool]


POSITIVE = Expected("a number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Expected("a number of at least 0", lambda value: 0 <= value < math.inf)
AT_LEAST_ONE = Expected("at least 1", lambda value: value >= 1)
BELOW_ONE = Expected("0 or more and below 1", lambda value: 0 <= value < 1)


def option(
    default: Any,
    help: str,
    expected: Expected | None = None,
    *,
    metavar: str | tuple[str, ...] | None = None,
    bare: Any = None,
    is_repeated: bool = False,
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: value without the option. `None`, `False` and `""` are not shown in the help.
        help: line of the help. Where a default depends on other options, it is described in brackets: `[the model's]`.
        expected: values that are accepted.
        metavar: name of the value in the help; a tuple for an option with several values.
        bare: value if the option is given on the command line without one.
        is_repeated: whether the option accepts one value or several, each of which must be as expected.
    """
    names = ("help", "expected", "metavar", "bare", "is_repeated")
    return dataclasses.field(
        default=default, metadata=dict(zip(names, (help, expected, metavar, bare, is_repeated), strict=True))
    )


class Parser(argparse.ArgumentParser):
    """Names the nearest option if one is misspelt."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def,override]
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self.describe_nearest(unknown)}")
        return namespace

    def describe_nearest(self, unknown: list[str]) -> str:
        """The options that are nearest to unknown ones, as the end of a message; empty if none is similar."""
        known = [flag for action in self._actions for flag in action.option_strings]
        flags = [argument.partition("=")[0].replace("_", "-") for argument in unknown if argument.startswith("--")]
        nearest = [flag for name in flags for flag in difflib.get_close_matches(name, known, n=1)]
        return f"; did you mean {', '.join(nearest)}?" if nearest else ""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are informative: not `None`, `False` or an empty text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == "":
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def add_arguments(parser: argparse._ActionsContainer, options_class: type) -> None:
    """Add the options of a dataclass to a parser or to one of its groups."""
    for field in dataclasses.fields(options_class):
        flag, settings = get_flag(field.name), {"default": field.default, "help": field.metadata["help"]}
        kind, choices = get_kinds(options_class)[field.name]
        if kind is bool:
            action: Any = argparse.BooleanOptionalAction if field.default else "store_true"
            parser.add_argument(flag, action=action, **settings)
            continue
        metavar, bare = field.metadata["metavar"], field.metadata["bare"]
        if field.metadata["is_repeated"]:
            settings["nargs"] = "+"
        elif isinstance(metavar, tuple):
            settings["nargs"] = len(metavar)
        elif bare is not None:
            settings |= {"nargs": "?", "const": bare}
        named = f"{{{','.join(choices)}}}" if choices else {int: "N", float: "X", str: "NAME"}[kind]
        convert = functools.partial(convert_text, kind=kind, choices=choices)
        parser.add_argument(flag, type=convert, metavar=metavar or named, **settings)


def parse_given(parser: argparse.ArgumentParser, options_class: type, argv: list[str] | None) -> dict[str, Any]:
    """Parse a command line into the options of a dataclass that it names, without those at their defaults.

    Arguments of the parser that are no fields of the dataclass are included always.
    """
    absent = object()
    unset = {field.name: absent for field in dataclasses.fields(options_class)}
    given = vars(parser.parse_args(argv, argparse.Namespace(**unset)))
    for field in dataclasses.fields(options_class):
        if field.metadata["is_repeated"] and given[field.name] is not absent and len(given[field.name]) == 1:
            (given[field.name],) = given[field.name]
    return {name: value for name, value in given.items() if value is not absent}


def read_config(path: str | Path, options_class: type) -> dict[str, Any]:
    """Read options from a YAML file: `name: value` lines, the names with hyphens or underscores.

    A value is converted as its text is on the command line. `null` stands for the default.

    Raises:
        InputError: the file cannot be read, a name is unknown or given twice, or a value has the wrong type.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config: cannot read {path} ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict | None):
        raise InputError(f"--config: expected 'option: value' lines in {path}, got a {type(content).__name__}")
    spellings: dict[str, str] = {}  # PyYAML keeps the last of equal keys without an error
    for key_node, _ in node.value if content else ():
        key = str(key_node.value)
        if (first := spellings.setdefault(key.replace("-", "_"), key)) is not key:
            raise InputError(f"--config: {path}: expected each option once, got {first!r} and {key!r}")
    known = {field.name: field for field in dataclasses.fields(options_class)}
    given = {}
    for key, value in (content or {}).items():
        name = str(key).replace("-", "_")
        if name not in known:
            (closest,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
            if "-" in str(key):
                closest = closest.replace("_", "-")
            raise InputError(f"--config: {path}: unknown option {str(key)!r}; the closest is {closest!r}")
        if value is not None:
            try:
                given[name] = convert_value(value, known[name], *get_kinds(options_class)[name])
            except argparse.ArgumentTypeError as error:
                raise InputError(f"--config: {path}: {name}: {error}") from None
    return given


def check_values(options: Any) -> None:
    """Check every option of a dataclass instance against the values that its field accepts."""
    for field in dataclasses.fields(options):
        check_value(field, getattr(options, field.name))


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Check a value against those that the field accepts; `None` always is.

    Raises:
        InputError: option, expected and given value.
    """
    expected = field.metadata["expected"]
    for each in value if field.metadata["is_repeated"] and isinstance(value, list) else [value]:
        if each is not None and expected is not None and not expected.accepts(each):
            raise InputError(f"{get_flag(field.name)}: expected {expected.words}, got {each}")


def get_flag(name: str) -> str:
    """The option of a field on the command line: `image_size` is `--image-size`."""
    return f"--{name.replace('_', '-')}"


@functools.cache
def get_kinds(options_class: type) -> dict[str, tuple[type, tuple[str, ...]]]:
    """Field -> type of its value or of each of its values, and the choices of a `Literal`."""
    kinds: dict[str, tuple[type, tuple[str, ...]]] = {}
    for name, annotation in get_type_hints(options_class).items():
        members = [member for member in get_args(annotation) if member is not NoneType]
        if members and get_origin(annotation) not in (Literal, list):  # X | None, or X | list[X] | None
            annotation = members[0]
        if get_origin(annotation) is list:
            (annotation,) = get_args(annotation)
        is_literal = get_origin(annotation) is Literal
        kinds[name] = (str, get_args(annotation)) if is_literal else (annotation, ())
    return kinds


KIND_NAMES = {int: "a whole number", float: "a number", str: "text"}


def convert_text(text: str, kind: type, choices: tuple[str, ...] = ()) -> Any:
    """Convert the text of a value, as argparse's `type`.

    Raises:
        argparse.ArgumentTypeError: expected and given value.
    """
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {KIND_NAMES[kind]}, got {text!r}") from None
    if choices and value not in choices:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(choices)}, got {text!r}")
    return value


def convert_value(value: Any, field: dataclasses.Field, kind: type, choices: tuple[str, ...]) -> Any:
    """Convert a value of a YAML file.

    Raises:
        argparse.ArgumentTypeError: expected and given value.
    """
    metavar = field.metadata["metavar"]
    if field.metadata["is_repeated"] and isinstance(value, list):
        return [convert_text(str(entry), kind, choices) for entry in value]
    if isinstance(metavar, tuple) and not field.metadata["is_repeated"]:
        if not isinstance(value, list) or len(value) != len(metavar):
            raise argparse.ArgumentTypeError(f"expected a list of {len(metavar)} values, got {value!r}")
        return [convert_text(str(entry), kind, choices) for entry in value]
    if kind is bool:
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError(f"expected true or false, got {value!r}")
        return value
    if isinstance(value, bool | list | dict) and not choices:
        raise argparse.ArgumentTypeError(f"expected {KIND_NAMES[kind]}, got {value!r}")
    return convert_text(str(value), kind, choices)
