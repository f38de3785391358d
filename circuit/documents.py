"""What files of this program hold, as pydantic models, and how JSON becomes one."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from circuit.errors import CircuitError

Schema = TypeVar("Schema", bound=BaseModel)


class Document(BaseModel):
    """What a file of this program holds: closed, frozen, strict.

    No validator is built before a file is read: most commands read one kind or none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


class FiniteDocument(Document):
    """One whose numbers are all finite."""

    model_config = ConfigDict(allow_inf_nan=False)


def validated(
    payload: Any,
    kind: type[Schema],
    *,
    where: object,
    expected: str | None = None,
    fix: str | None = None,
) -> Schema:
    """A JSON payload as an object of a schema.

    Raises:
        CircuitError: a field is missing, unknown, of another type or out of range; it is named.
    """
    try:
        return kind.model_validate_json(json.dumps(payload))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise CircuitError(
            f"field '{field}': {message}" if field else message,
            where=where,
            expected=expected,
            fix=fix,
        ) from None
