"""A route: one stage, one role, one subspace, through which a clean activation is let in.

On a command line a route is one word, `label=...,stage=...,position_role=...` and, unless it is the
whole residual, `subspace=...,rank=...` with `head_layer=...,head=...` for a head's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from circuit.errors import CircuitError
from circuit.model.components import Component
from circuit.model.stages import stage_hook
from circuit.model.subspaces import (
    EMBEDDING_SUBSPACES,
    FULL_RESIDUAL,
    HEAD_SUBSPACES,
    SUBSPACES,
    check_rank,
)
from circuit.tasks.positions import ROLES
from circuit.train_config import ModelConfig

OPTION = "--route"
_KEYS = ("label", "stage", "subspace", "rank", "head_layer", "head", "position_role")
_NUMBERS = ("rank", "head_layer", "head")


@dataclass(frozen=True)
class Route:
    """Where a corrupted run is patched.

    Attributes:
        label: names the route; unique among those of a report.
        stage: of the residual stream.
        position_role: a role of definitions.md section 2.
        subspace: one of `SUBSPACES`.
        rank: of the subspace; None for the whole residual.
        head: whose subspace it is, where it is a head's.
    """

    label: str
    stage: str
    position_role: str
    subspace: str = FULL_RESIDUAL
    rank: int | None = None
    head: Component | None = None

    def to_row(self) -> dict[str, Any]:
        """The route as JSON; the head by its address."""
        return {**asdict(self), "head": None if self.head is None else str(self.head)}


def parse_route(spec: str) -> Route:
    """A route from its word (see the module's docstring).

    Raises:
        CircuitError: a key is unknown, missing, named twice or has no value; a number is none; or
            rank and head do not fit the subspace.
    """
    given = _split(spec)
    for key in ("label", "stage", "position_role"):
        if key not in given:
            raise CircuitError(f"no {key} in '{spec}'", where=OPTION, expected=f"{key}=...")
    numbers = {key: _number(key, given[key], spec) for key in _NUMBERS if key in given}
    subspace = given.get("subspace", FULL_RESIDUAL)
    if ("head" in numbers) != ("head_layer" in numbers):
        raise CircuitError(
            f"route '{given['label']}' names half a head",
            where=OPTION,
            expected="both head_layer=... and head=..., or neither",
        )
    head = Component(numbers["head_layer"], numbers["head"]) if "head" in numbers else None
    route = Route(
        given["label"], given["stage"], given["position_role"], subspace, numbers.get("rank"), head
    )
    _check_shape(route)
    return route


def check_routes(
    routes: Sequence[Route], model: ModelConfig, *, num_keys: int, num_values: int
) -> None:
    """Refuse routes that a model of this shape does not have.

    Raises:
        CircuitError: there is no route, a label is named twice, or a stage, role, subspace, head or
            rank does not exist; the route is named.
    """
    if not routes:
        raise CircuitError("no route", where=OPTION, expected="at least one")
    labels = [route.label for route in routes]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise CircuitError(f"two routes have the label '{twice}'", where=OPTION)
    most = {
        "embedding_key_identity": min(num_keys - 1, model.d_model),
        "embedding_value_identity": min(num_values - 1, model.d_model),
        **dict.fromkeys(HEAD_SUBSPACES, model.d_model // model.heads),
    }
    for route in routes:
        where = f"route '{route.label}'"
        _check_shape(route)
        try:
            stage_hook(route.stage, model.layers)
            if route.head is not None and (
                route.head.layer >= model.layers or (route.head.head or 0) >= model.heads
            ):
                raise CircuitError(
                    f"the model has no component '{route.head}'",
                    expected=f"layers 0-{model.layers - 1}, heads 0-{model.heads - 1}",
                )
            if route.rank is not None:
                check_rank(route.subspace, route.rank, most[route.subspace])
        except CircuitError as error:
            raise CircuitError(
                error.what, where=where, expected=error.expected, fix=error.fix
            ) from None


def _split(spec: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for part in spec.split(","):
        key, equals, value = (text.strip() for text in part.partition("="))
        if key not in _KEYS:
            raise CircuitError(
                f"unknown key '{key}' in '{spec}'", where=OPTION, expected=", ".join(_KEYS)
            )
        if not equals or not value:
            raise CircuitError(f"'{key}' has no value in '{spec}'", where=OPTION)
        if key in given:
            raise CircuitError(f"'{key}' stands twice in '{spec}'", where=OPTION)
        given[key] = value
    return given


def _number(key: str, text: str, spec: str) -> int:
    if not text.isdecimal():
        raise CircuitError(
            f"{key}={text} in '{spec}'", where=OPTION, expected="a whole number, 0 or more"
        )
    return int(text)


def _check_shape(route: Route) -> None:
    """Refuse names that do not exist, and a rank or head where there can be none."""
    where = f"route '{route.label}'"
    if route.subspace not in SUBSPACES:
        raise CircuitError(
            f"unknown subspace '{route.subspace}'",
            where=where,
            expected=f"one of {', '.join(SUBSPACES)}",
        )
    if route.position_role not in ROLES:
        raise CircuitError(
            f"unknown role '{route.position_role}'",
            where=where,
            expected=f"one of {', '.join(ROLES)}",
        )
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
    if route.head is not None and (whole or route.subspace in EMBEDDING_SUBSPACES):
        raise CircuitError(
            f"subspace '{route.subspace}' is of no head",
            where=where,
            fix="leave out head_layer and head",
        )
