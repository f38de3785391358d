"""`--set field=value`: fields of a config file that a command line replaces.

A field is named by its dotted path in the file (`optimizer.learning_rate`); its value is JSON, and
text where it is no JSON. Replacements go into the file's JSON, in order and before it is validated,
so that every check of `circuit.config` holds for the result.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from circuit.documents import Document
from circuit.errors import CircuitError
from circuit.strict_json import RefusedJsonError, parse_json

Kind = type[BaseModel]
Path = tuple[str, ...]


class Overrides(Document):
    """What was replaced in a config: the record that runs and reports keep.

    Attributes:
        config: the file, as it was named.
        set: the replacements `field=value`, in order.
        earlier: of that file itself, if it is the `run_config.json` of a run with overrides.
    """

    config: str
    set: list[str]
    earlier: Overrides | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in files."""
        return self.model_dump(mode="json", exclude_none=True)


def apply_overrides(payload: Any, texts: Sequence[str], kind: Kind) -> Any:
    """The JSON of a config with some fields replaced; `payload` stays as it is.

    Raises:
        CircuitError: a text is no `field=value`, names no field of `kind`, or sets what it or
            another one has set; the text is named.
    """
    if not isinstance(payload, dict):
        return payload  # no config: validation says so
    changed = copy.deepcopy(payload)
    seen: dict[Path, str] = {}
    for text in texts:
        path, value = parse_override(text)
        again = next((other for other in seen if other[: len(path)] == path), None)
        if again is not None:
            raise CircuitError(
                f"'{'.'.join(again)}' is set already",
                where=_option(text),
                fix="set each field once",
            )
        seen[path] = text
        _replace(changed, path, value, kind, text)
    return changed


def parse_override(text: str) -> tuple[Path, Any]:
    """`optimizer.name=sgd` -> `(("optimizer", "name"), "sgd")`.

    Raises:
        CircuitError: it is no pair, its text is no UTF-8, or it is JSON that `parse_json` refuses.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CircuitError("no text", where=ascii(_option(text)), expected="UTF-8") from None
    name, sign, value = text.partition("=")
    path = tuple(name.split("."))
    if not sign or not all(path):
        raise CircuitError(
            "not a pair",
            where=_option(text),
            expected="field=value, such as seed=11 or optimizer.learning_rate=0.001",
        )
    try:
        return path, parse_json(value)
    except RefusedJsonError as error:
        raise CircuitError(str(error), where=_option(text)) from None
    except ValueError:
        return path, value  # text, whatever the part of it that was read


def causes(field: Path, texts: Sequence[str]) -> list[str]:
    """The overrides that a complaint about a field may be due to, as they were typed.

    A complaint about the whole file (an empty `field`) may be due to any of them.
    """
    matching = [text for text in texts if not field or parse_override(text)[0][0] == field[0]]
    return [_option(text) for text in matching]


def advice(problems: Sequence[Any]) -> str | None:
    """How to write an override that validation has refused, where that is not obvious.

    Args:
        problems: pydantic's, of which the type counts.
    """
    problem_types = {problem["type"] for problem in problems}
    if "string_type" in problem_types:
        return """write text that is also JSON in quotes: --set 'name="7"'"""
    if "extra_forbidden" in problem_types:
        return "an object of another kind is set as a whole: --set 'optimizer={\"name\": ...}'"
    return None


def field_names(kind: Kind, payload: Any = None) -> list[str]:
    """Dotted names of the fields that can be set and hold no others, in the file's order.

    Args:
        kind: of config.
        payload: the file's JSON, which decides between alternatives and names the splits.
    """
    return [".".join(path) for path, _ in _leaves(kind, payload)]


def field_values(kind: Kind, payload: Any, name: str) -> list[str]:
    """What may stand behind `name=`: its closed set of values, else the present value.

    Values that the rest of the file contradicts are left out.
    """
    leaves = _leaves(kind, payload, every=True)
    annotation = next((a for path, a in leaves if ".".join(path) == name), None)
    if annotation is None:
        return []
    texts = [str(value) for value in _literals(annotation)]
    if texts:
        return _accepted(kind, payload, name, texts)
    value = payload
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None or isinstance(value, list):
        return []
    quoted = json.dumps(value)  # "7" is text in quotes only
    texts = [value, quoted] if isinstance(value, str) else [quoted]
    return _accepted(kind, payload, name, texts)[:1]


def _accepted(kind: Kind, payload: Any, name: str, texts: Sequence[str]) -> list[str]:
    """Those with which the file has no problem that it has not without them."""
    accepted = []
    try:
        before = _problems(kind, payload)
        for text in texts:
            with suppress(CircuitError):
                changed = apply_overrides(payload, [f"{name}={text}"], kind)
                if _problems(kind, changed) <= before:
                    accepted.append(text)
    except RecursionError:  # JSON that can be read may be nested too deeply to be copied
        return []
    return accepted


def _problems(kind: Kind, payload: Any) -> set[tuple[Any, str]]:
    """Validation's, by place; without fields that are missing, which may be set next."""
    try:
        kind.model_validate_json(json.dumps(payload))
    except ValidationError as error:
        missing = ("missing", "union_tag_not_found")
        return {(e["loc"], e["msg"]) for e in error.errors() if e["type"] not in missing}
    return set()


# --- the tree of fields ---------------------------------------------------------------------------


def _replace(payload: dict[str, Any], path: Path, value: Any, kind: Kind, text: str) -> None:
    """Set one field in place."""
    node, annotation = payload, kind
    for depth, name in enumerate(path):
        last = depth == len(path) - 1
        fields = _children(annotation, node)
        if name not in fields and not (last and _value_type(annotation)):
            _refuse_unknown(path, depth, fields, kind, payload, text)
        if last:
            node[name] = value
            return
        holder = ".".join(path[: depth + 1])
        if not _has_fields(fields[name]):
            raise CircuitError(
                f"'{holder}' holds no fields",
                where=_option(text),
                expected=f"{holder}=value, which sets it as a whole",
            )
        inner = node.setdefault(name, _default(annotation, name))
        if not isinstance(inner, dict):
            raise CircuitError(f"'{holder}' is {json.dumps(inner)}, no object", where=_option(text))
        node, annotation = inner, fields[name]


def _default(annotation: Any, name: str) -> dict[str, Any]:
    """What an object holds that the file leaves out."""
    for model in _models(annotation):
        field = model.model_fields.get(name)
        default = None if field is None else field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            return default.model_dump(mode="json")
    return {}


def _refuse_unknown(
    path: Path, depth: int, fields: dict[str, Any], kind: Kind, payload: Any, text: str
) -> NoReturn:
    outer, name, rest = path[:depth], path[depth], path[depth + 1 :]
    near = get_close_matches(name, fields, n=1)
    if near:
        guesses = [".".join((*outer, near[0], *rest))]
    else:  # the right name in the wrong place?
        endings = {leaf: leaf.rpartition(".")[2] for leaf in field_names(kind, payload)}
        last = get_close_matches(path[-1], dict.fromkeys(endings.values()), n=1)
        guesses = [leaf for leaf, ending in endings.items() if [ending] == last]
    raise CircuitError(
        f"unknown field '{'.'.join((*outer, name))}'",
        where=_option(text),
        expected=f"one of {', '.join(fields)}" if fields and not guesses else None,
        fix=f"did you mean {' or '.join(guesses[:3])}?" if guesses else None,
    )


def _leaves(
    annotation: Any, payload: Any, path: Path = (), *, every: bool = False
) -> Iterator[tuple[Path, Any]]:
    for name, inner in _children(annotation, payload, every=every).items():
        value = payload.get(name) if isinstance(payload, dict) else None
        if _has_fields(inner):
            yield from _leaves(inner, value, (*path, name), every=every)
        else:
            yield (*path, name), inner


def _children(annotation: Any, payload: Any, *, every: bool = False) -> dict[str, Any]:
    """Fields of an object by name, with their types.

    Args:
        annotation: of the object.
        payload: its JSON; of alternatives those count that it fits.
        every: all alternatives count.
    """
    if _value_type(annotation):
        names = payload if isinstance(payload, dict) else {}
        return dict.fromkeys(names, _value_type(annotation))
    models = _models(annotation)
    fitting = [model for model in models if every or _fits(model, payload)] or models
    fields: dict[str, Any] = {}
    for model in fitting:
        for name, field in model.model_fields.items():
            fields[name] = fields[name] | field.annotation if name in fields else field.annotation
    return fields


def _fits(model: Kind, payload: Any) -> bool:
    if not isinstance(payload, dict):
        return True
    fields = model.model_fields
    closed = {name: _literals(field.annotation) for name, field in fields.items()}
    return all(
        name in fields and (not closed[name] or value in closed[name])
        for name, value in payload.items()
    )


def _has_fields(annotation: Any) -> bool:
    return bool(_models(annotation) or _value_type(annotation))


def _models(annotation: Any) -> list[Kind]:
    return [
        one
        for one in _alternatives(annotation)
        if isinstance(one, type) and issubclass(one, BaseModel)
    ]


def _value_type(annotation: Any) -> Any:
    """`T` of `dict[str, T]`, else None."""
    value_types = [get_args(one)[1] for one in _alternatives(annotation) if get_origin(one) is dict]
    return value_types[0] if value_types else None


def _literals(annotation: Any) -> list[Any]:
    return [
        value
        for one in _alternatives(annotation)
        if get_origin(one) is Literal
        for value in get_args(one)
    ]


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, without their constraints."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [one for member in get_args(annotation) for one in _alternatives(member)]
    return [annotation]


def _option(text: str) -> str:
    return f"--set {text}"
