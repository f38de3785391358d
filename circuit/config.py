"""Every file under configs/ as a pydantic model; unknown keys are refused by name.

Two kinds of file: a benchmark (of a task: circuit/tasks/) and a training run (train_config.py).
Here is what they share: reading, validation, overrides, digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError

from circuit.documents import FiniteDocument
from circuit.errors import CircuitError
from circuit.folders import read_config
from circuit.overrides import Overrides, advice, apply_overrides, causes
from circuit.reading import checked_path

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _folder_name(name: str) -> str:
    try:
        checked_path(name)
    except CircuitError as error:
        raise ValueError(error.what) from None
    return name


FolderName = Annotated[str, Field(min_length=1), AfterValidator(_folder_name)]


def digest_of(payload: dict[str, Any]) -> str:
    """sha256 of canonical JSON (sorted keys, no spaces)."""
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class Config(FiniteDocument):
    """An object of a config file, which remembers what a command line has set."""

    _overrides: Overrides | None = PrivateAttr(default=None)

    @property
    def overrides(self) -> Overrides | None:
        """Which of the values a command line has set; no part of values, digest and dumps."""
        return self._overrides

    def origin(self) -> dict[str, Any]:
        """`{"overrides": ...}` for the record of what was made from this config; else empty."""
        return {} if self._overrides is None else {"overrides": self._overrides.to_json()}

    def remembering(self, other: Config) -> Self:
        """A copy that tells the overrides of another config; the values stay."""
        copied = self.model_copy()
        copied._overrides = other._overrides
        return copied

    def to_json(self, *, origin: bool = False) -> str:
        """The config as it is written to disk: indented, one trailing newline.

        Args:
            origin: with its overrides, if there are any; `load_config` reads them back.
        """
        payload = self.model_dump(mode="json") | (self.origin() if origin else {})
        return json.dumps(payload, indent=2) + "\n"

    def digest(self) -> str:
        """sha256 of the config's canonical JSON."""
        return digest_of(self.model_dump(mode="json"))


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(
    path: str | Path,
    kind: type[ConfigT],
    overrides: Sequence[str] = (),
    *,
    places: Mapping[str, str] | None = None,
) -> ConfigT:
    """Read and validate one JSON config file.

    Args:
        path: the file.
        kind: `TrainConfig` or that of a task's benchmark.
        overrides: `field=value`, applied in order before validation (circuit/overrides.py); the
            config remembers them.
        places: fields that the file's place decides, whatever stands in it.

    Raises:
        CircuitError: the file is missing, is not JSON, or a field is unknown, missing, of the
            wrong type or out of range; the field is named by its path in the file. Or an override
            is none.
    """
    path = checked_path(path)
    payload = read_config(path)
    earlier = None
    if isinstance(payload, dict) and _ORIGIN in payload:
        earlier = _parse_origin(payload.pop(_ORIGIN), path)
    if isinstance(payload, dict):
        payload |= places or {}
    payload = apply_overrides(payload, overrides, kind)
    config = parse_config(payload, kind, where=path, overrides=overrides)
    config._overrides = (
        Overrides(config=str(path), set=list(overrides), earlier=earlier) if overrides else earlier
    )
    return config


_ORIGIN = "overrides"
"""Key of the record in a run_config.json."""


def _parse_origin(payload: Any, path: Path) -> Overrides:
    try:
        return Overrides.model_validate(payload)
    except ValidationError:
        raise CircuitError(
            f"field '{_ORIGIN}' is no record of overrides",
            where=path,
            fix="remove it; it is written by this program alone",
        ) from None


def parse_config(
    payload: Any, kind: type[ConfigT], *, where: object, overrides: Sequence[str] = ()
) -> ConfigT:
    """Validate a JSON payload that stands at `where` (a file name, used in messages).

    Args:
        payload: the JSON.
        kind: of config.
        where: as said.
        overrides: that are in the payload already; a complaint names those that it may be due to.

    Raises:
        CircuitError: as `load_config`.
    """
    try:
        return kind.model_validate_json(json.dumps(payload))
    except ValidationError as error:
        problems = error.errors()
        shown = "; ".join(_describe(item) for item in problems[:3])
        more = f" (+{len(problems) - 3} more)" if len(problems) > 3 else ""
        due = dict.fromkeys(o for item in problems for o in causes(_location(item), overrides))
        place = f"{where} with {', '.join(due)}" if due else where
        raise CircuitError(
            shown + more, where=place, fix=advice(problems) if due else None
        ) from None


# pydantic puts the tried member of a union into the location, behind the field (of `splits`, behind
# the split's name); it is no key of the file.
_UNION_TAG_AT = {"optimizer": 1, "splits": 2}


def _location(item: Any) -> tuple[str, ...]:
    """Path in the file of what a complaint is about."""
    location = [str(part) for part in item["loc"]]
    tag_at = _UNION_TAG_AT.get(location[0]) if location else None
    if tag_at is not None and tag_at < len(location):
        del location[tag_at]
    return tuple(location)


def _describe(item: Any) -> str:
    field = ".".join(_location(item)) or "(top level)"
    if item["type"] == "extra_forbidden":
        return f"unknown field '{field}'; remove it or correct its name"
    if item["type"] == "missing":
        return f"missing field '{field}'"
    message = item["msg"].removeprefix("Value error, ")
    value = item.get("input")
    if isinstance(value, dict | list):
        return f"field '{field}': {message}"
    text = json.dumps(value)
    return f"field '{field}': {message}, got {text if len(text) < 80 else text[:77] + '...'}"


def first_difference(field: str, theirs: Any, ours: Any) -> str:
    """The innermost field that differs, with both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*ours, *theirs]:
            if theirs.get(key) != ours.get(key):
                return first_difference(f"{field}.{key}", theirs.get(key), ours.get(key))
    return f"{field} is {theirs!r} there and {ours!r} here"
