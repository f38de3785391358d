"""Credit beside the exact path kernel of ExPLAIND (package explaind, Python 3.12 or later).

    pip install 'circuit-formation[bench]'
    OMP_NUM_THREADS=1 python benchmarks/beside_explaind.py [--steps N] [--probes N]

Trains explaind's transformer on sums modulo 23, once by explaind's loop, which stores every state,
and once as a recipe with a trace, and divides what happened to the log-probabilities of some inputs
among the training examples by both, with the same nodes of the path. Where explaind's assumptions
hold (equal batches, no clipping, rates tracked, a full batch in one order) credits are equal; where
one does not, the closure of each tells. Then the processor time of a step, and its disk.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from explaind.data_paths import DataPath
from explaind.epk_model import ExactPathKernelModel
from explaind.model_paths import ModelPath
from explaind.modulo_model.data import ClassificationDataset
from explaind.modulo_model.loss import RegularizedCrossEntropyLoss
from explaind.modulo_model.model import SingleLayerTransformerClassifier
from explaind.optimizer_paths import AdamWOptimizerPath
from torch import Tensor, nn

import circuit
from circuit.attribution.credit import CreditPass
from circuit.attribution.window import attributor_of
from circuit.model.readout import LOGITS
from circuit.runs.base import Run
from circuit.scalars.base import Cache, Needs
from circuit.trace.record import RecordOptions, record_trace
from circuit.training.own_recipe import recipe_config

P = 23
TOKENS = P + 2
EXAMPLES = 256
ADAMW = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}


def sums() -> tuple[Tensor, Tensor]:
    """Sequences `a + b =` and their sums, in one shuffled order; training examples come first."""
    pairs = torch.cartesian_prod(torch.arange(P), torch.arange(P))
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    plus, equals = torch.full((2, len(pairs)), P) + torch.arange(2)[:, None]
    return torch.stack([pairs[:, 0], plus, pairs[:, 1], equals], 1), pairs.sum(1) % P


INPUTS, TARGETS = sums()


class Equal(circuit.Recipe):
    """Equal batches in one order, a constant rate, no clipping: what explaind assumes."""

    size: ClassVar[int] = 64
    track_lr: ClassVar[bool] = False

    def module(self) -> nn.Module:
        return SingleLayerTransformerClassifier(TOKENS)  # gives log-probabilities

    def rows(self, step: int) -> Tensor:
        """Numbers of the examples that a step reads."""
        batches = torch.arange(EXAMPLES).split(self.size)
        return batches[(step - 1) % len(batches)]

    def batch(self, step: int) -> circuit.Batch:
        rows = self.rows(step)
        return circuit.Batch(INPUTS[rows], TARGETS[rows], rows)

    def losses(self, outputs: Tensor, batch: circuit.Batch) -> Tensor:
        each = nn.functional.nll_loss(outputs, batch.targets, reduction="none")
        return each / batch.size

    def loss(self, outputs: Tensor, batch: circuit.Batch) -> Tensor:
        return nn.functional.nll_loss(outputs, batch.targets)  # in the bits of explaind's

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(module.parameters(), **ADAMW)

    def rates(self, step: int) -> list[float]:
        return [ADAMW["lr"]]


class Ragged(Equal):
    """The last batch of an epoch is smaller."""

    size = 72


class Clipped(Equal):
    """Gradients are scaled down to a norm."""

    clip = 0.2


class Scheduled(Equal):
    """Warm-up and decay; explaind takes the last rate for all steps unless it is told to track."""

    def rates(self, step: int) -> list[float]:
        return [ADAMW["lr"] * min(step / 20, 1.0) * (0.1 + 0.9 * math.exp(-step / 30))]


class Tracked(Scheduled):
    """The same, and explaind tracks the rates."""

    track_lr = True


class Shuffled(Equal):
    """All examples in every step, each time in another order."""

    size = EXAMPLES

    def rows(self, step: int) -> Tensor:
        return torch.randperm(EXAMPLES, generator=torch.Generator().manual_seed(step))


CASES = (Equal, Ragged, Clipped, Scheduled, Tracked, Shuffled)


@dataclass(frozen=True)
class LogProbability:
    """The log-probability of one token behind one input (a `circuit.scalars.base.Scalar`)."""

    tokens: tuple[int, ...]
    token: int
    constant: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{self.token} behind {self.tokens}"

    @property
    def needs(self) -> Needs:
        return Needs(((*self.tokens, 0),), (LOGITS,))  # the last token of a sequence is not read

    def bind(self, model: Any) -> LogProbability:
        return self

    def values(self, model: Any, cache: Cache) -> Tensor:
        return cache[LOGITS][:, -1, self.token]


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--nodes", type=int, default=4, help="midpoints of a step, in both")
    parser.add_argument("--probes", type=int, default=2, help="inputs whose outputs are divided")
    args = parser.parse_args()
    probes = INPUTS[EXAMPLES : EXAMPLES + args.probes]
    scalars = [LogProbability(tuple(p), token) for p in probes.tolist() for token in range(TOKENS)]
    print(f"{len(scalars)} log-probabilities, {args.steps} steps, {args.nodes} midpoints a step")
    print("case: closure here, there; credits: largest difference, correlation; weights at the end")
    with tempfile.TemporaryDirectory() as folder:
        for kind in CASES:
            beside = Beside(kind, Path(folder) / kind.__name__, args.steps, args.nodes)
            print(f"{kind.__name__}: {beside.compare(scalars, probes)}", flush=True)
        print(Beside(Equal, Path(folder) / "costs", args.steps, args.nodes).costs(scalars, probes))


class Beside:
    """One training, by both."""

    def __init__(self, kind: type[Equal], folder: Path, steps: int, nodes: int) -> None:
        """Train twice from the same weights."""
        self.kind, self.folder, self.steps, self.nodes = kind, folder, steps, nodes
        code = f"{__file__}:{kind.__name__}"
        config = recipe_config(code, folder / "run", steps=steps, overrides=["threads=1"])
        record_trace(config, folder / "trace", RecordOptions(end_step=steps))
        self.run: Run = circuit.open_run(folder / "trace", recipe=code)
        self.recipe = kind()
        self._train(self.run.model(0))

    def _train(self, module: nn.Module) -> None:
        """By explaind's loop (its README), which stores all states."""
        recipe, there = self.recipe, self.folder / "explaind"
        dataset = ClassificationDataset(INPUTS[:EXAMPLES].tolist(), TARGETS[:EXAMPLES].tolist())
        batches = [recipe.rows(step).tolist() for step in range(1, self.steps + 1)]
        self.data = DataPath(
            torch.utils.data.DataLoader(dataset, batch_sampler=batches),
            checkpoint_path=there / "data.pt",
            overwrite=True,
        )
        self.model = ModelPath(
            module,
            device="cpu",
            checkpoint_path=there / "model.pt",
            overwrite=True,
            output_dim=TOKENS,
        )
        self.optimizer = AdamWOptimizerPath(
            self.model,
            **ADAMW,
            track_lr=recipe.track_lr,
            checkpoints=[],  # its default is one list for all optimizers of a process
            checkpoint_path=there / "optimizer.pt",
            overwrite=True,
            device="cpu",
        )
        with contextlib.redirect_stdout(io.StringIO()):
            self.loss = RegularizedCrossEntropyLoss(alpha=0.0)
        for step, batch in enumerate(self.data.dataloader, 1):
            inputs, targets = self.data.get_batch(batch)
            self.optimizer.zero_grad()
            self.loss(self.model.forward(inputs), targets).backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), recipe.clip, foreach=False)
            (self.optimizer.optimizer.param_groups[0]["lr"],) = recipe.rates(step)
            self.optimizer.step()
            self.model.log_checkpoint()
            self.optimizer.log_checkpoint()

    def kernel(self, **options: Any) -> ExactPathKernelModel:
        """Explaind's attribution, with the nodes of `midpoint:N` in every step."""
        return ExactPathKernelModel(
            self.model,
            self.optimizer,
            self.loss,
            self.data,
            integral_eps=1 / self.nodes,
            early_steps=0,
            evaluate_predictions=False,
            kernel_store_interval=self.steps + 1,
            device="cpu",
            **options,
        )

    def compare(self, scalars: Sequence[LogProbability], probes: Tensor) -> str:
        """Closure and credits of both."""
        taken = circuit.credit(self.run, scalars, 0, self.steps, rule=f"midpoint:{self.nodes}")
        sums = [taken[scalar.name].by_example() for scalar in scalars]
        rows = [[one[str(example)] for example in range(EXAMPLES)] for one in sums]
        here = torch.tensor(rows, dtype=torch.float64)
        # without the kernel of single parameters it fails at step 0: nobody makes its `prev_eval`
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            end, start, parts, *_ = self.kernel(keep_param_wise_kernel=True).predict(
                probes, keep_kernel_matrices=True
            )
        # by parameter [probe, 1, token, example], not yet over the batch's size
        sizes = [len(one["indices"]) for one in self.data.checkpoints]
        there = sum(parts.values()).flatten(0, 2) / (sum(sizes) / len(sizes))
        totals = [taken[scalar.name].totals for scalar in scalars]
        actual = torch.tensor([one["actual"] for one in totals])
        left = torch.tensor([one["closure"] for one in totals]) * actual.abs()
        missed = (end - start).flatten().detach() - actual
        apart = (here - there).abs().max() / here.abs().max()
        both = torch.stack([here.flatten(), there.flatten().double()])
        return (
            f"{float(left.sum() / actual.abs().sum()):.1e},"
            f" {float(missed.abs().sum() / actual.abs().sum()):.1e};"
            f" {float(apart):.1e}, {float(torch.corrcoef(both)[0, 1]):.8f}; {self._weights()}"
        )

    def _weights(self) -> str:
        """Whether both trainings have ended with the same weights."""
        ends = self.run.model(self.steps).state_dict(), self.model.checkpoints[-1]
        equal = all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
        return "equal bits" if equal else "others"

    def costs(self, scalars: Sequence[LogProbability], probes: Tensor) -> str:
        """Processor time and disk of a step."""
        lines = []
        everything = torch.eye(TOKENS)
        for some, inputs, outputs in (
            (scalars[:1], probes[:1], everything[:1]),
            (scalars, probes, everything),
        ):
            self._credited(some[:1], 1)  # whatever is imported or made once
            here, there = self._credited(some, self.steps), self._kerneled(inputs, outputs)
            lines.append(
                f"processor time of a step, {len(some)} outputs: here (replayed and checked)"
                f" {here:.1f} ms, there (from stored states) {there:.1f} ms"
            )
        for part in (self.model, self.optimizer, self.data):
            part.save_checkpoints()
        here, there = (
            sum(path.stat().st_size for path in (self.folder / name).rglob("*") if path.is_file())
            for name in ("trace", "explaind")
        )
        lines.append(
            f"disk a step: here {here / self.steps:.0f} bytes, there {there / self.steps:.0f}"
            f" ({there / here:.0f} times as much)"
        )
        return "\n".join(lines)

    def _credited(self, scalars: Sequence[LogProbability], steps: int) -> float:
        """Milliseconds a step."""
        began = time.process_time()
        rule = f"midpoint:{self.nodes}"
        attributor = attributor_of(self.run, scalars, rule=rule, averages=True)
        for _ in CreditPass(self.run, attributor, 0, steps):
            pass
        return (time.process_time() - began) / steps * 1e3

    def _kerneled(self, inputs: Tensor, outputs: Tensor) -> float:
        """Milliseconds a step of what `predict` does, of some outputs, which it cannot choose."""
        kernel, optimizer = self.kernel(), self.optimizer
        began = time.process_time()
        sums, notes, average, decayed = None, {}, None, None
        for step, nodes in kernel.get_integral_steps(1 / self.nodes, early_steps=0):
            batch = self.data.get_checkpoint(step)
            ids = batch["indices"]
            parts, average, features, notes = kernel.exact_path_kernel_step_test(
                *(inputs, batch["X"], batch["y"], average, step, outputs, nodes, ids),
                prev_eval=notes,
            )
            kernel.get_prediction_from_kernel(parts, batch_size=len(ids))
            _, decayed = optimizer.get_reg_term(features, decayed, step)
            rate = optimizer.get_learning_rate(step + 1)
            sums, notes = kernel.update_kernel_matrix(sums, parts, ids, rate, step, notes)
        return (time.process_time() - began) / self.steps * 1e3


if __name__ == "__main__":
    main()
