"""The reports that stand under a run's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuit.artifacts import Row, iter_jsonl
from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.overrides import Overrides
from circuit.page.commands import command_of
from circuit.page.panel import Source
from circuit.strict_json import parse_json
from circuit.train_config import RUN_CONFIG, TrainConfig
from circuit.training.run_folder import Identity

_SUFFIX = "_report.json"


@dataclass(frozen=True)
class Found:
    """One report on disk."""

    run: Path
    path: Path
    payload: Mapping[str, Any]
    run_overrides: Mapping[str, Any] | None = None
    """Those that stand in the run's own config."""

    @property
    def overrides(self) -> Mapping[str, Any] | None:
        """Its record of overrides, unless the run's own config says it all."""
        found: Mapping[str, Any] | None = self.payload["provenance"].get("overrides")
        return None if found == self.run_overrides else found

    @property
    def command(self) -> str:
        """The command that wrote it."""
        return str(self.payload["command"])

    @property
    def parameters(self) -> Mapping[str, Any]:
        """With which it was called."""
        found: Mapping[str, Any] = self.payload["parameters"]
        return found

    @property
    def summary(self) -> Mapping[str, Any]:
        """Its main numbers."""
        found: Mapping[str, Any] = self.payload["summary"]
        return found

    @property
    def written(self) -> float:
        """When it was begun, seconds since 1970."""
        return float(self.payload["provenance"]["started_unix"])

    @property
    def name(self) -> str:
        """Stem of its files."""
        return self.path.name.removesuffix(_SUFFIX)

    def file(self, name: str = "") -> Path:
        """One of its files; `<name>_rows.jsonl` where none is named."""
        return self.path.with_name(name or f"{self.name}_rows.jsonl")

    def rows(self, file: str = "", *, holding: str = "") -> Iterator[Row]:
        """Rows of one of its files; see `iter_jsonl`."""
        return iter_jsonl(self.file(file), holding=holding)

    def source(self, home: str, file: str = "") -> Source:
        """Where the numbers of one of its files stand.

        Args:
            home: the run's folder as commands name it.
        """
        folder = self.path.parent.relative_to(self.run).as_posix()
        return Source(
            self.path.relative_to(self.run).as_posix(),
            self.file(file).relative_to(self.run).as_posix(),
            command_of(self.command, self.parameters, home, f"{home}/{folder}", self.overrides),
            str(self.payload.get("law", "")),
        )


class Reports:
    """Every report under a run's folder, by command."""

    def __init__(self, run: Path) -> None:
        """Read them.

        Raises:
            CircuitError: a file that is named like a report is damaged.
        """
        self.run = run
        self.by_command: dict[str, list[Found]] = {}
        self.left_out: list[str] = []
        """Reports of another run that stand here, relative to the run's folder."""
        own = _run_overrides(run)
        identity = Identity.of(run) if (run / RUN_CONFIG).exists() else None
        for path in sorted((run / "analysis").rglob(f"*{_SUFFIX}")):
            found = Found(run, path, _read(path), own)
            if identity is not None and identity.denies(found.payload["provenance"]):
                self.left_out.append(path.relative_to(run).as_posix())
            else:
                self.by_command.setdefault(found.command, []).append(found)

    def all(self, command: str) -> list[Found]:
        """Those of a command, the oldest first."""
        return sorted(self.by_command.get(command, []), key=lambda report: report.written)

    def best(self, command: str, size: Callable[[Found], tuple[float, ...]]) -> Found | None:
        """The most complete one of a command, by `size`; among equals the newest."""
        return max(self.all(command), key=lambda r: (*size(r), r.written), default=None)


def _run_overrides(run: Path) -> Mapping[str, Any] | None:
    path = run / RUN_CONFIG
    overrides = load_config(path, TrainConfig).overrides if path.exists() else None
    return None if overrides is None else overrides.to_json()


def _read(path: Path) -> Mapping[str, Any]:
    try:
        payload = parse_json(path.read_text(encoding="utf-8"))
        _ = payload["command"], payload["summary"].keys(), payload["parameters"].keys()
        _ = float(payload["provenance"]["started_unix"])
        if "overrides" in payload["provenance"]:
            Overrides.model_validate(payload["provenance"]["overrides"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CircuitError(
            f"is no report of this program ({error!r})",
            where=path,
            fix="make it again, or move it away",
        ) from None
    found: Mapping[str, Any] = payload
    return found
