"""open_run, read_rows, attribute: what a notebook starts from.

run = circuit.open_run("artifacts/runs/quickstart")
model = run.model(400)                       # a HookedTransformer
batch = run.batch("validation_iid")          # tokens and read indices
logits, cache = model.run_with_cache(batch.tokens)

trace = circuit.open_trace(run.path / "analysis/optimizer_update_trace")
series = circuit.attribute(trace, [scalar], 300, 340)[scalar.name]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from circuit.artifacts import find_folder, read_jsonl
from circuit.attribution.attribute import Attributor
from circuit.attribution.groups import Partition, check_partition
from circuit.attribution.series import Series
from circuit.config import RUN_CONFIG, load_run_config
from circuit.errors import CircuitError
from circuit.lazy import pd, torch
from circuit.model.standard import standard_model
from circuit.scalars.base import Scalar
from circuit.tasks.benchmark import Benchmark, load_benchmark
from circuit.tasks.positions import Batch, EncodedSplit
from circuit.tasks.symbolic_kv import Vocabulary
from circuit.trace.replay import Trace
from circuit.training.checkpoints import TrainState, list_checkpoints, load_checkpoint
from circuit.training.run_folder import BEST, METRICS
from circuit.training.session import encode_split, model_from_state

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


class Run:
    """A training run on disk.

    Attributes:
        path: the run's folder.
        config: what it was trained with.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a run's folder (or its `run_config.json`); nothing else is read yet.

        Raises:
            CircuitError: there is no run here.
        """
        path = Path(path)
        self.path = path.parent if path.name == RUN_CONFIG else path
        if not (self.path / RUN_CONFIG).is_file():
            raise CircuitError(
                f"holds no {RUN_CONFIG}",
                where=self.path,
                expected="the folder of a run",
                fix="train one with `circuit train` or `circuit quickstart`",
            )
        self.config = load_run_config(self.path)
        self._splits: dict[str, EncodedSplit] = {}

    def __repr__(self) -> str:
        steps = self.steps
        span = f"{len(steps)} checkpoints, {steps[0]} to {steps[-1]}" if steps else "no checkpoints"
        shape = self.config.model
        return f"Run({self.path}: {shape.layers} layers, {shape.heads} heads, {span})"

    @property
    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return list(list_checkpoints(self.path / "checkpoints"))

    @cached_property
    def benchmark(self) -> Benchmark:
        """The run's benchmark with all of its splits."""
        return load_benchmark(find_folder(self.config.benchmark_dir, self.path))

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the run's benchmark."""
        return self.benchmark.vocabulary

    def checkpoint(self, step: int | str = "best") -> TrainState:
        """A saved state: a step, or `"best"`.

        Raises:
            CircuitError: there is no such checkpoint, or it is damaged.
        """
        if step == "best":
            return load_checkpoint(self.path / BEST)
        saved = list_checkpoints(self.path / "checkpoints")
        found = saved.get(step) if isinstance(step, int) else None
        if found is None:
            raise CircuitError(
                f"no checkpoint of step {step}",
                where=self.path,
                expected=f"one of {', '.join(map(str, self.steps)) or '(none)'} or 'best'",
            )
        return load_checkpoint(found)

    def model(self, step: int | str = "best", *, untied: bool = False) -> HookedTransformer:
        """The model after `step` optimizer steps, or the best one.

        Args:
            untied: as plain TransformerLens has it, with a `W_U` of its own, for tools that read
                that from the `state_dict` (`process_weights_`, `SVDInterpreter`); a copy whose
                logits are equal to rounding (circuit/model/standard.py).

        Raises:
            CircuitError: as `checkpoint`; or it belongs to another config or benchmark.
        """
        model = model_from_state(self.checkpoint(step), self.config, self.benchmark)
        return standard_model(model) if untied else model

    def batch(self, split: str, indices: Sequence[int] | torch.Tensor | None = None) -> Batch:
        """Records of a split (all by default) as tokens `[batch, pos]` with read indices.

        Raises:
            CircuitError: there is no such split, or an index is out of range.
        """
        if split not in self._splits:
            self._splits[split] = encode_split(self.benchmark, split, self.config.model)
        return self._splits[split].batch(indices).to(self.config.device)

    def metrics(self) -> pd.DataFrame:
        """The rows of `metrics.jsonl`: `kind` is `train` or `evaluation`."""
        return read_rows(self.path / METRICS)


def open_run(path: str | Path) -> Run:
    """Open a run's folder.

    Raises:
        CircuitError: there is no run here.
    """
    return Run(path)


def attribute(
    trace: Trace,
    scalars: Iterable[Scalar],
    start: int,
    end: int,
    *,
    rule: str = "simpson",
    partitions: Sequence[Partition] = ("circuit",),
    dtype: torch.dtype | None = None,
) -> dict[str, Series]:
    """Attribute scalars over the steps that take state `start` to state `end` of a trace.

    Replay sets torch's intra-op threads to those of the run, and leaves them so.

    Args:
        scalars: the step-by-step changes of each are split by the terms of the update.
        rule: path rule: `midpoint`, `simpson` or `gauss:N`.
        partitions: of the parameters, whose groups are listed.
        dtype: of the model that evaluates scalars and gradients, float32 by default. In float64,
            what is left is the path rule's error alone.

    Returns:
        One `Series` a scalar, by name.

    Raises:
        CircuitError: the window is not recorded, a step does not replay, two scalars share a
            name, or there is no such rule or partition.
    """
    scalars = list(scalars)
    names = [scalar.name for scalar in scalars]
    if not names or len(set(names)) < len(names):
        raise CircuitError(f"scalars {', '.join(names) or '(none)'}", expected="each once")
    chosen = [check_partition(partition) for partition in partitions]
    state = trace.store.anchor(trace.manifest.start_step)
    model = model_from_state(state, trace.manifest.config, trace.benchmark)
    attributor = Attributor(
        model.to(dtype or torch.float32, print_details=False), scalars, rule=rule
    )
    steps = trace.steps(start, end)
    return Series.collect(row for step in steps for row in attributor.step(step).rows(chosen))


def read_rows(path: str | Path) -> pd.DataFrame:
    """A row file (JSON Lines) as a DataFrame; nested objects become dotted columns.

    Raises:
        CircuitError: the file is missing, or a line is damaged (file and line named).
    """
    return pd.json_normalize(read_jsonl(Path(path)))
