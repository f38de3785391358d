"""circuit trace show, verify, checkout on what `circuit.watch` has recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from circuit import CircuitError
from circuit.quoting import counted

from .output import print_facts, print_json, print_written, progress_bar, stdout


def is_recording(folder: Path) -> bool:
    """Whether a folder holds a recording, and no trace.

    Raises:
        CircuitError: it holds neither.
    """
    from circuit.folders import RECORDING, trace_folder

    if (folder / RECORDING).is_file():
        return True
    trace_folder(folder)
    return False


def show(folder: Path, as_json: bool) -> None:
    """What is in a recording."""
    from circuit.runs.recording import Recording
    from circuit.sizes import shown

    recording = Recording(folder)
    m, environment = recording.manifest, recording.manifest.environment
    if as_json:
        payload = m.model_dump(mode="json", exclude={"parameters"})
        size = {"numbers": recording.layout.size, "bytes": recording.size}
        anchors: dict[str, Any] = {"last_step": recording.last_step, "ended": recording.ended}
        anchors |= {"anchors": recording.anchors}
        print_json({**payload, **anchors, **size})
        return
    shape = f"{recording.layout.size} numbers in {counted(len(m.parameters), 'parameter')}"
    print_facts(
        str(folder),
        {
            "module": f"{m.module}, {shape}",
            "optimizer": ", ".join(one.kind.rpartition(".")[2] for one in m.optimizers),
            "steps": f"0 to {recording.last_step}"
            + ("" if recording.ended else " (cut off: the loop has not ended)"),
            "kept": "the gradients of every step"
            if m.keep == "gradients"
            else f"the state of every {m.every} steps",
            "states": f"{len(recording.anchors)} stored",
            "size": shown(recording.size),
            "recorded on": f"torch {environment['torch']}, {environment['cpu_capability']},"
            f" threads {environment['threads']}, {environment['device']}",
        },
    )


def verify(folder: Path, start: int | None, end: int | None, as_json: bool) -> None:
    """Take every step again from its gradient. Exit code 1 if bits differ."""
    from circuit.runs.recorded import RecordedRun
    from circuit.runs.recording import Recording

    run = RecordedRun(Recording(folder))
    with progress_bar(not as_json) as bar:
        last = run.recording.last_step if end is None else end
        task = bar.add_task("executing", total=last - (start or 0), note="")
        verified = run.verify(start, end, progress=lambda step: bar.update(task, advance=1))
    if as_json:
        payload: dict[str, Any] = {"law": verified.law, "steps": verified.end - verified.start}
        print_json({**payload, "equal": verified.difference is None, "paths": []})
    else:
        stdout.print(
            f"{counted(verified.compared_anchors, 'stored state')} compared; {verified.law}",
            soft_wrap=True,
        )
    if verified.difference is not None:
        raise typer.Exit(1)


def checkout(folder: Path, step: int, output: Path | None, overwrite: bool, as_json: bool) -> None:
    """Write the weights and buffers after a step, for `module.load_state_dict`."""
    from circuit.artifacts import OutputFolder
    from circuit.runs.recorded import RecordedRun, weights_file
    from circuit.runs.recording import Recording

    if output is None or output.suffix != ".safetensors":
        raise CircuitError(
            f"{output}" if output else "no file to write",
            where="--output",
            expected="the name of a .safetensors file, to which a recording's weights go",
        )
    run = RecordedRun(Recording(folder))
    command = f"trace-checkout.{output.stem}"
    with OutputFolder(output.parent, command, writes=[output.name], overwrite=overwrite) as outputs:
        path = outputs.write_bytes(output.name, weights_file(run.state(step), run.recording))
    if as_json:
        print_json({"step": step, "drifts": [], "paths": [str(path)]})
        return
    print_written([path])
    stdout.print(f"weights of step {step}, equal to the recorded digest")
