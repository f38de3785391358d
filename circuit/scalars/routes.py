"""A route: one stage, one role, one subspace, through which a clean activation is let in.

On a command line a route is one word, `label=...,stage=...,position_role=...` and, unless it is the
whole residual, `subspace=...,rank=...` with `head_layer=...,head=...` for a head's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from circuit.errors import CircuitError
from circuit.model.components import Component, parse_component
from circuit.model.stages import stage_hook
from circuit.model.subspaces import (
    FULL_RESIDUAL,
    HEAD_SUBSPACES,
    check_name,
    check_rank,
    check_subspace,
)
from circuit.numerals import whole_number
from circuit.tasks.base import Task
from circuit.train_config import ModelConfig

_FIELD = "`routes`"
_KEYS = ("label", "stage", "subspace", "rank", "head_layer", "head", "position_role")
_NUMBERS = ("rank", "head_layer", "head")


@dataclass(frozen=True)
class Route:
    """Where a corrupted run is patched; as text it is its word.

    Attributes:
        label: names the route; unique among those of a report.
        stage: of the residual stream.
        position_role: a role of definitions.md section 2.
        subspace: one of those of circuit/model/subspaces.py.
        rank: of the subspace; None for the whole residual.
        head: whose subspace it is, where it is a head's.

    Raises:
        CircuitError: a name does not exist, or rank and head do not fit the subspace.
    """

    label: str
    stage: str
    position_role: str
    subspace: str = FULL_RESIDUAL
    rank: int | None = None
    head: Component | None = None

    def __post_init__(self) -> None:
        if not self.label or self.label.strip() != self.label or "," in self.label:
            raise CircuitError(f"label {self.label!r}", where=_FIELD, expected="a name, no comma")
        _check_shape(self)

    def __str__(self) -> str:
        values = {**self.to_row(), "head_layer": None, "head": None}
        if self.head is not None:
            values |= {"head_layer": self.head.layer, "head": self.head.head}
        return ",".join(f"{key}={values[key]}" for key in _KEYS if values[key] is not None)

    def to_row(self) -> dict[str, Any]:
        """The route as JSON; the head by its address."""
        return {**asdict(self), "head": None if self.head is None else str(self.head)}


def read_route(value: Any) -> Any:
    """A route from its word or its JSON; anything else as it is.

    Raises:
        CircuitError: as `parse_route`; or the JSON has other fields.
    """
    if isinstance(value, str):
        return parse_route(value)
    if not isinstance(value, Mapping):
        return value
    address = value.get("head")
    head = parse_component(address, kind="head") if isinstance(address, str) else address
    try:
        return Route(**{**value, "head": head})
    except TypeError:
        raise CircuitError(f"{value} is no route", where=_FIELD) from None


def parse_route(spec: str) -> Route:
    """A route from its word (see the module's docstring).

    Raises:
        CircuitError: a key is unknown, missing, named twice or has no value; a number is none; or
            rank and head do not fit the subspace.
    """
    texts = _split(spec)
    for key in ("label", "stage", "position_role"):
        if key not in texts:
            raise CircuitError(f"no {key} in '{spec}'", where=_FIELD, expected=f"{key}=...")
    numbers = {key: _number(key, texts[key], spec) for key in _NUMBERS if key in texts}
    subspace = texts.get("subspace", FULL_RESIDUAL)
    if ("head" in numbers) != ("head_layer" in numbers):
        raise CircuitError(
            f"route '{texts['label']}' names half a head",
            where=_FIELD,
            expected="both head_layer=... and head=..., or neither",
        )
    head = Component(numbers["head_layer"], numbers["head"]) if "head" in numbers else None
    return Route(
        texts["label"], texts["stage"], texts["position_role"], subspace, numbers.get("rank"), head
    )


def check_labels(routes: Sequence[Route], taken: str) -> None:
    """Refuse two routes of one label, and a label that is taken.

    Raises:
        CircuitError: names it.
    """
    labels = [route.label for route in routes]
    if taken in labels:
        expected = "another label: it is the name of the whole gap"
        raise CircuitError(f"a route has the label '{taken}'", where=_FIELD, expected=expected)
    for label in labels:
        if labels.count(label) > 1:
            raise CircuitError(f"two routes have the label '{label}'", where=_FIELD)


def check_routes(
    routes: Sequence[Route],
    model: ModelConfig,
    task: Task | None = None,
) -> None:
    """Refuse routes that a model of this shape does not have.

    Args:
        task: where it is known.

    Raises:
        CircuitError: a stage, head, role, subspace or rank does not exist; the route is named.
    """
    for route in routes:
        try:
            stage_hook(route.stage, model.layers, attention_only=model.attention_only)
            if route.head is not None:
                parse_component(str(route.head), shape=model)
            if task is not None:
                task.check_roles(route.position_role)
                check_subspace(
                    route.subspace,
                    route.rank,
                    route.head,
                    d_model=model.d_model,
                    d_head=model.d_model // model.heads,
                    token_sets=task.token_sets,
                )
            elif route.rank is not None:
                in_head = route.subspace in HEAD_SUBSPACES
                width = model.d_model // model.heads if in_head else model.d_model
                check_rank(route.subspace, route.rank, width)
        except CircuitError as error:
            raise CircuitError(
                error.what,
                where=f"route '{route.label}'",
                expected=error.expected,
                fix=error.fix,
            ) from None


def _split(spec: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for part in spec.split(","):
        key, equals, value = (text.strip() for text in part.partition("="))
        if key not in _KEYS:
            raise CircuitError(
                f"unknown key '{key}' in '{spec}'", where=_FIELD, expected=", ".join(_KEYS)
            )
        if not equals or not value:
            raise CircuitError(f"'{key}' has no value in '{spec}'", where=_FIELD)
        if key in texts:
            raise CircuitError(f"'{key}' stands twice in '{spec}'", where=_FIELD)
        texts[key] = value
    return texts


def _number(key: str, text: str, spec: str) -> int:
    number = whole_number(text)
    if number is None:
        raise CircuitError(
            f"{key}={text} in '{spec}'", where=_FIELD, expected="a whole number, 0 or more"
        )
    return number


def _check_shape(route: Route) -> None:
    """Refuse names that do not exist, and a rank or head where there can be none."""
    where = f"route '{route.label}'"
    try:
        check_name(route.subspace)
    except CircuitError as error:
        raise CircuitError(error.what, where=where, expected=error.expected) from None
    whole = route.subspace == FULL_RESIDUAL
    if whole and route.rank is not None:
        raise CircuitError(
            f"{FULL_RESIDUAL} is everything and takes no rank", where=where, fix="leave it out"
        )
    if not whole and route.rank is None:
        raise CircuitError(f"subspace '{route.subspace}' needs a rank", where=where, fix="add rank")
    if route.subspace in HEAD_SUBSPACES and route.head is None:
        raise CircuitError(
            f"subspace '{route.subspace}' needs a head", where=where, fix="add head_layer and head"
        )
    if route.head is not None and route.subspace not in HEAD_SUBSPACES:
        raise CircuitError(
            f"subspace '{route.subspace}' is of no head",
            where=where,
            fix="leave out head_layer and head",
        )
