"""Execute the notebooks; equal runs give equal text.

    python notebooks/run.py [--write] [NOTEBOOK ...]

The executed notebooks go to artifacts/notebooks/, and with --write in place. Another machine trains
other weights (docs/exactness.md), which would change the committed outputs in their last digits.

They look at the run that `circuit quickstart` makes, or train for themselves. Each is executed in a
fresh kernel of this interpreter, one thread, and keeps outputs only: no clock, no version, no path.
And, of those that look at a run, the digest of what it says about a much smaller one, so that a
test sees cheaply where the program has changed; there one kernel executes all, which imports what
they need once.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

import circuit
from circuit.config import parse_config
from circuit.core.digests import tensors_digest
from circuit.quickstart import quickstart, quickstart_configs
from circuit.tasks.base import TaskConfig
from circuit.train_config import TrainConfig

FOLDER = Path(__file__).parent
ELSEWHERE = FOLDER.parent / "artifacts" / "notebooks"
RUN = "../artifacts/runs/quickstart"
"""As the notebooks name it: a kernel starts in its notebook's folder."""
FORGET = "import torch\ntorch.set_grad_enabled(True)\n%reset -f"
"""Between two notebooks of one kernel: what the first has set, and its names."""
TIMEOUT = 600
"""Seconds for one cell, and for a kernel to start."""
SMALL = {"steps": 24, "eval_every": 12, "checkpoint_every": 6, "batch_size": 16}
"""Fields of a training config of which notebooks can be run, though it forms no circuit."""


def small_configs() -> tuple[TaskConfig, TrainConfig]:
    """The quickstart's two configs with a twentieth of the steps and a fraction of the data."""
    benchmark, config = quickstart_configs()
    payload = benchmark.model_dump(mode="json") | {"heuristic_max_accuracy": 1.0}
    for name, split in payload["splits"].items():
        split["samples"] = 128 if name == "train" else 48
    schedule = {"name": "constant", "warmup_steps": 4}
    return (
        parse_config(payload, type(benchmark), where="small benchmark"),
        config.replace(**SMALL, schedule=schedule),
    )


@contextlib.contextmanager
def small_quickstart() -> Iterator[None]:
    """Within the block the quickstart is that of the small configs."""
    configs = small_configs()
    with mock.patch("circuit.quickstart.quickstart_configs", return_value=configs):
        yield


def notebooks() -> list[Path]:
    """The notebooks, in order."""
    return sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> NotebookNode:
    """A notebook as it stands on disk."""
    return nbformat.read(path, as_version=4)


def execute(paths: Sequence[Path], folder: Path) -> list[NotebookNode]:
    """Notebooks with the outputs that they have in `folder`, without what differs between calls.

    One kernel executes them all, one after the other; none has the names of an earlier one.

    Raises:
        CellExecutionError: a cell fails.
    """
    notebooks = [read(path) for path in paths]
    forget = nbformat.v4.new_code_cell(FORGET)
    whole = nbformat.v4.new_notebook()
    for notebook in notebooks:
        whole.cells += copy.deepcopy([*notebook.cells, forget])
    for number, cell in enumerate(whole.cells):
        cell.id = str(number)  # several notebooks may have the same
    specs = KernelSpecManager(kernel_dirs=[])  # ipykernel's own: this interpreter's environment
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    client = NotebookClient(
        whole,
        km=manager,
        timeout=TIMEOUT,
        startup_timeout=TIMEOUT,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )
    with tempfile.TemporaryDirectory() as profile:  # a user's own IPython settings stay out
        # nbclient leaves a kernel whose manager it was given running unless told otherwise
        asyncio.run(client.async_execute(env=_environment(profile), cleanup_kc=True))
    executed = iter(whole.cells)
    for notebook in notebooks:
        for cell in notebook.cells:
            cell.update({**next(executed), "id": cell.id})
        next(executed)
        _clean(notebook, weights(folder) if looks_at_the_run(notebook) else None)
    return notebooks


def _clean(notebook: NotebookNode, best: str | None) -> None:
    """Leave what is the same in every call, and the weights that were looked at."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "circuit": {} if best is None else {"best_weights_sha256": best},
        }
    )
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])


def _smaller(png: str) -> str:
    """A picture (base64) with a palette of 128 colours: a third of its bytes."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    buffer = io.BytesIO()
    flat.convert("RGB").quantize(128).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _environment(profile: str) -> dict[str, str]:
    """This process's environment, one thread, and nothing of the user's that shows in outputs."""
    kept = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return kept | {
        "IPYTHONDIR": profile,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm, where ipywidgets is not installed
    }


def looks_at_the_run(notebook: NotebookNode) -> bool:
    """Whether it opens the quickstart's run."""
    return any(f'"{RUN}"' in cell.source for cell in notebook.cells)


def weights(folder: Path) -> str:
    """sha256 of the best weights of the run that a notebook in `folder` looks at."""
    run = circuit.open_run(folder / RUN)
    return tensors_digest(run.state("best").parameters)


def texts(notebook: NotebookNode) -> list[str]:
    """All that its outputs say in words, in order."""
    said: list[str] = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            said += [output.text] if output.output_type == "stream" else []
            said += [data[kind] for kind in sorted(data) if kind.startswith("text/")]
    return said


def said_of(notebook: NotebookNode) -> dict[str, str]:
    """The weights that an executed notebook looked at, and the digest of its words about them."""
    words = hashlib.sha256("\0".join(texts(notebook)).encode()).hexdigest()
    return {**notebook.metadata.circuit, "words_sha256": words}


def main(words: Sequence[str]) -> None:
    """Execute the named notebooks, or all: here, and on the small run."""
    in_place = "--write" in words
    chosen = [Path(word) for word in words if word != "--write"] or notebooks()
    with tempfile.TemporaryDirectory() as name:
        small = Path(name, FOLDER.name)
        small.mkdir()
        looking = [path for path in chosen if looks_at_the_run(read(path))]
        of_small = {}
        if looking:
            with contextlib.chdir(name), small_quickstart():
                quickstart()
            of_small = dict(zip(looking, execute(looking, small), strict=True))
        for path in chosen:
            committed, (executed,) = read(path), execute([path], FOLDER)
            weights = "best_weights_sha256"
            here = executed.metadata.circuit.get(weights)
            same = here == committed.metadata.get("circuit", {}).get(weights)
            if path in of_small:
                executed.metadata.circuit.small = said_of(of_small[path])
            output = path if in_place else ELSEWHERE / path.name
            output.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(executed, output)
            of = "the weights of the committed one" if same else "other weights"
            of = of if here is not None else "trained for itself"
            print(f"{output}: {output.stat().st_size / 1024:.0f} KB, {of}")


if __name__ == "__main__":
    main(sys.argv[1:])
