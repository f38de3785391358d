"""Whether a run, a trace or a config is where it is said to be, and what to say where it is not.

Nothing here imports pydantic: commands look before they import what reads them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from circuit.errors import CircuitError
from circuit.quoting import shell_line
from circuit.reading import MissingFileError, checked_path, read_json

RUN_CONFIG = "run_config.json"
"""In the folder of a run: the values in use."""

TRACE = "trace.json"
"""What tells the folder of a trace."""
RECORDING = "recording.json"
"""What tells the folder of a recording (`circuit.watch`)."""
RECORDED_ROWS = "watch_rows.jsonl"
"""What stands beside it, or, of `keep="rows"`, alone."""


def no_run(folder: Path) -> CircuitError:
    """What to say where a run is asked for and a folder has no run_config.json: what it is."""
    expected = "the folder of a run, or a config file"
    if not folder.is_dir():
        return CircuitError(
            "there is no such folder",
            where=folder,
            expected=expected,
            fix="check the path, or train one with `circuit train` or `circuit quickstart`",
        )
    if (folder / RECORDING).is_file():
        return CircuitError(
            "is a recording of somebody's own loop, which has no config",
            where=folder,
            expected=expected,
            fix="say what makes its module: `circuit import-recording "
            + shell_line([str(folder)])
            + " --module FILE.py:NAME`; without that circuit trace show, verify and checkout take"
            " it, and circuit.open_run in Python",
        )
    if (folder / RECORDED_ROWS).is_file():
        return CircuitError(
            "holds the numbers of a loop alone, which was watched with keep='rows', and no state",
            where=folder,
            expected=expected,
            fix="circuit.read_rows reads them; watch it again with keep='gradients' or 'states'",
        )
    return CircuitError(
        "holds no run_config.json",
        where=folder,
        expected=expected,
        fix="train one with `circuit train` or `circuit quickstart`",
    )


def config_file(where: str | Path) -> Path:
    """The file of a config that is named, or of the run whose folder is.

    Raises:
        CircuitError: there is none.
    """
    path = checked_path(where)
    if (path / RUN_CONFIG).is_file():
        return path / RUN_CONFIG
    if path.is_dir():
        raise no_run(path)
    if not os.path.lexists(path):
        raise _no_file(path)
    return path


def run_folder(where: str | Path) -> Path:
    """The folder of a run that is named, or whose `run_config.json` is.

    Raises:
        CircuitError: it holds none.
    """
    path = checked_path(where)
    folder = path.parent if path.name == RUN_CONFIG else path
    if not (folder / RUN_CONFIG).is_file():
        raise no_run(folder)
    return folder


def trace_folder(where: str | Path) -> Path:
    """The folder of a trace that is named, or whose `trace.json` is.

    Raises:
        CircuitError: it holds none.
    """
    path = checked_path(where)
    folder = path.parent if path.name == TRACE else path
    if not os.path.lexists(folder / TRACE):
        raise no_trace(folder)
    return folder


def no_trace(folder: Path) -> CircuitError:
    """What to say where a trace is asked for and a folder has no trace.json."""
    of_run = sorted(folder.glob(f"analysis/**/{TRACE}"))
    record = "record one with `circuit trace record`, or of your own loop with circuit.watch"
    return CircuitError(
        "there is no trace here",
        where=folder,
        expected=f"a folder with {TRACE}",
        fix=f"this run's is {of_run[0].parent}" if of_run else record,
    )


def metadata_path(path: str | Path) -> Path:
    """`<name>.metadata.json` beside the probe set `<name>.jsonl`.

    Raises:
        CircuitError: the name does not end in `.jsonl`.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise CircuitError("no name of a probe set", where=path, expected="a name in .jsonl")
    return path.with_suffix(".metadata.json")


def look_for_probe_set(where: str | Path) -> None:
    """Refuse a probe set that is not there.

    Raises:
        CircuitError: there is none, or no metadata beside it.
    """
    path = checked_path(where)
    if not os.path.lexists(metadata_path(path)):
        raise no_probe_set(path)


def no_probe_set(path: Path) -> CircuitError:
    """What to say where there is no probe set, or no metadata beside it."""
    return CircuitError(
        "no such file",
        where=metadata_path(path) if path.exists() else path,
        expected="a probe set with its metadata beside it",
        fix="run `circuit generate-probe-set --output` with this path",
    )


def read_config(path: Path) -> Any:
    """The JSON of a config file.

    Raises:
        CircuitError: it is missing, cannot be read or is no JSON.
    """
    if path.is_dir():
        raise no_run(path)
    try:
        return read_json(path)
    except MissingFileError:
        raise _no_file(path) from None


def _no_file(path: Path) -> CircuitError:
    return CircuitError("no such config file", where=path, fix="check the path")
