"""modular-addition-progress-report: memorization, and the circuit that adds, over training.

At every checkpoint all p * p sums are asked: loss and accuracy of both splits, the measures of
Nanda et al. 2023 (circuit/scalars/modular_addition.py), and the share of each Fourier frequency in
the non-constant power of two matrices over the numbers: `W_E`, and the neuron-logit map
`W_out W_U` of the last layer's MLP (null where there is none). A matrix is *spread* over the fewest
frequencies that hold 90 % of that power.

*Key frequencies* are those that are asked for, or the fewest that hold 90 % of the power of `W_E`
at the last checkpoint. Everything is float64 from the model's logits and weights on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from circuit.artifacts import Row
from circuit.core.fourier import power_by_frequency, power_shares
from circuit.figures.charts import Chart, at_step, chart, colour, heat, last_dashed, lines
from circuit.lazy import no_grad, torch
from circuit.model.layout import hooked_tensors
from circuit.options import CheckpointOptions, Option
from circuit.reports.inputs import Checkpointed, check_headers, models_at, states_at
from circuit.reports.report import Findings, OfCheckpoints, Results
from circuit.reports.tables import Table
from circuit.scalars.modular_addition import (
    EQUALS,
    EXCLUDED,
    KEY_POWER,
    RESTRICTED,
    SQUARED,
    LogitParts,
    check_sums,
    every_input,
)
from circuit.tasks.base import Task
from circuit.tasks.modular_addition.task import TEST, TRAIN, ModularAddition

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformer_lens import HookedTransformer

FREQUENCY_ROWS = "modular_addition_progress_frequency_rows.jsonl"
W_E, NEURON_LOGIT = "W_E", "neuron_logit"
MATRICES = {W_E: "W_E", NEURON_LOGIT: "neuron-logit map"}
HELD = 0.9
"""Share of the power that key frequencies hold, and by which matrices are spread."""
LEARNED = 0.99
"""Accuracy from which on a split counts as learned."""
LOSSES = {
    "train_loss": "train",
    "test_loss": "test",
    RESTRICTED: "restricted (all inputs)",
    EXCLUDED: "excluded (train)",
}
BATCH = 2048


class ProgressOptions(CheckpointOptions):
    """Which frequencies are the circuit's (definitions.md section 8)."""

    key_frequencies: Annotated[
        tuple[int, ...],
        Option(
            "Key frequency.",
            flag="--key-frequency",
            least=1,
            unset="the fewest that hold 90 % of W_E's non-constant power at the last checkpoint",
        ),
    ] = ()

    def check_task(self, task: Task) -> None:
        """Also refuses another task, and frequencies that its modulus does not have."""
        super().check_task(task)
        check_sums(task, self.key_frequencies)


class ModularAdditionProgress(OfCheckpoints[ProgressOptions]):
    """How modular addition is memorized and then generalized, by Fourier frequency."""

    command = "modular-addition-progress-report"
    Options = ProgressOptions
    title = "From memorizing to adding"
    place = 9
    task = "modular_addition"
    question = "When does a circuit of few frequencies form, and when does it take over?"

    def prepare(self) -> None:
        from circuit.trace.states import States
        from circuit.training.recipe_setup import setup_of

        self.setup = setup_of(self.config, self.options.checkpoints[0])
        task = self.setup.benchmark.task
        self.options.check_task(task)
        assert isinstance(task, ModularAddition), "check_task has seen to it"
        self.sums = task
        self.states = States(self.setup)
        check_headers(self.setup, self.states, self.options.checkpoints)
        self.frequencies: list[Row] = []
        self.gaps = dict.fromkeys(("parts", "transform", "matrices"), 0.0)

    def points(self) -> Iterator[Checkpointed]:
        inputs = every_input(self.sums.modulus)
        self.tokens = torch.tensor(inputs, device=self.config.device)
        trained = torch.tensor([self.sums.is_trained(a, b) for a, b, _ in inputs])
        self.of_split = {TRAIN: trained.nonzero()[:, 0], TEST: (~trained).nonzero()[:, 0]}
        self.key = self.options.key_frequencies or self._key_of_last()
        for point in models_at(self.setup, self.states, self.options.checkpoints):
            self.digests[str(point.step)] = point.digest
            yield point

    def _key_of_last(self) -> tuple[int, ...]:
        ((_, state),) = states_at(self.setup, self.states, self.options.checkpoints[-1:])
        tensors = hooked_tensors(state.parameters, self.config.model)
        shares = power_shares(tensors["embed.W_E"][: self.sums.modulus])
        return tuple(sorted(fewest(shares.tolist())))

    @no_grad
    def measure(self, point: Checkpointed) -> Iterator[Row]:
        parts = LogitParts.of(self._logits(point.model), self.key)
        powers = {
            "mean": float(parts.mean.square().sum()) * len(parts.logits),
            "key": float(parts.key.square().sum()),
            "rest": float(parts.rest.square().sum()),
        }
        whole = float(parts.logits.square().sum())
        self._gap("parts", sum(powers.values()), whole, whole)
        self._gap("transform", powers["key"], _power_by_fft(parts, self.key), whole)
        shares = self._shares(point)
        yield {
            "step": point.step,
            **self._of_splits(parts),
            RESTRICTED: float(parts.restricted_losses().mean()),
            EXCLUDED: float(parts.excluded_losses(self.of_split[TRAIN]).mean()),
            KEY_POWER: sum((shares[W_E] or [])[k - 1] for k in self.key),
            SQUARED: float(sum(one.double().square().sum() for one in point.model.parameters())),
            **{f"spread_{name}": share and len(fewest(share)) for name, share in shares.items()},
            **{f"logits_{name}": power / (whole or 1.0) for name, power in powers.items()},
            "weights_sha256": point.digest,
        }

    def _gap(self, name: str, one: float, other: float, scale: float) -> None:
        self.gaps[name] = max(self.gaps[name], abs(one - other) / (scale or 1.0))

    def _logits(self, model: HookedTransformer) -> Float[Tensor, "input token"]:
        starts = range(0, len(self.tokens), BATCH)
        batches = (self.tokens[start : start + BATCH] for start in starts)
        return torch.cat([model(batch)[:, EQUALS].double().cpu() for batch in batches])

    def _of_splits(self, parts: LogitParts) -> dict[str, float]:
        """Loss and accuracy of each split."""
        losses = torch.nn.functional.cross_entropy(parts.logits, parts.answers, reduction="none")
        hits = (parts.logits.argmax(1) == parts.answers).double()
        measured = {"loss": losses, "accuracy": hits}
        return {
            f"{split}_{name}": float(values[chosen].mean())
            for name, values in measured.items()
            for split, chosen in self.of_split.items()
        }

    def _shares(self, point: Checkpointed) -> dict[str, list[float] | None]:
        """Of each frequency from 1 in each matrix's power that is not constant."""
        shares: dict[str, list[float] | None] = dict.fromkeys(MATRICES)
        for name, matrix in number_matrices(point.model, self.sums.modulus).items():
            norm = float(matrix.square().sum())
            self._gap("matrices", float(power_by_frequency(matrix).sum()), norm, norm)
            shares[name] = of_matrix = power_shares(matrix).tolist()
            self.frequencies += [
                {
                    "step": point.step,
                    "matrix": name,
                    "frequency": k,
                    "share": share,
                    "is_key": k in self.key,
                }
                for k, share in enumerate(of_matrix, 1)
            ]
        return shares

    def conclude(self, rows: list[Row]) -> Findings:
        from_options = bool(self.options.key_frequencies)
        last = rows[-1]["step"]
        chosen = f"the fewest that hold {HELD:.0%} of W_E's non-constant power at step {last}"
        summary = {
            "modulus": self.sums.modulus,
            "steps": [row["step"] for row in rows],
            "key_frequencies": list(self.key),
            "key_frequencies_are": "those asked for" if from_options else chosen,
            "learned_at": {split: learned_at(rows, split) for split in (TRAIN, TEST)},
            "last": {key: value for key, value in rows[-1].items() if key != "weights_sha256"},
        }
        law = (
            "mean, key frequencies and rest of the logits have powers that sum to the logits' own"
            f" to {self.gaps['parts']:.1g} of it, that of the key frequencies is a two-dimensional"
            f" FFT's to {self.gaps['transform']:.1g}, and the powers by frequency of W_E and the"
            f" neuron-logit map sum to their squared norms to {self.gaps['matrices']:.1g}, at every"
            " checkpoint"
        )
        return Findings(rows, summary, law, {FREQUENCY_ROWS: self.frequencies})

    def provenance(self) -> dict[str, Any]:
        provenance = self.config.provenance(self.setup.benchmark.digest)
        return {**provenance, "parameters_sha256": self.digests}

    # --- what is shown ---

    @classmethod
    def size(cls, results: Results[ProgressOptions]) -> tuple[float, ...]:
        return (len(results.summary["steps"]),)

    @classmethod
    def notes(cls, results: Results[ProgressOptions]) -> list[str]:
        summary, last = results.summary, results.summary["last"]
        steps, key = summary["steps"], ", ".join(map(str, summary["key_frequencies"]))
        when = {
            split: "at no checkpoint for good" if step is None else f"from step {step} on"
            for split, step in summary["learned_at"].items()
        }
        return [
            f"Sums modulo {summary['modulus']}, {len(steps)} checkpoints, steps {steps[0]} to"
            f" {steps[-1]}. {LEARNED:.0%} of the training sums are right {when[TRAIN]}, of the"
            f" test sums {when[TEST]}.",
            f"Key frequencies are {summary['key_frequencies_are']}: {key}. At the end they hold"
            f" {last[KEY_POWER]:.1%} of W_E's non-constant power; the loss is"
            f" {last[RESTRICTED]:.3g} nats with nothing else in the logits but their mean, and"
            f" {last[EXCLUDED]:.3g} on the training sums without them.",
        ]

    @classmethod
    def tables(cls, results: Results[ProgressOptions]) -> list[Table]:
        columns = {
            "step": "step",
            **{name: (f"{words} loss", ".3g") for name, words in LOSSES.items()},
            "train_accuracy": ("train accuracy", ".1%"),
            "test_accuracy": ("test accuracy", ".1%"),
            KEY_POWER: ("key share of W_E", ".1%"),
            "spread_W_E": "frequencies of W_E",
            "spread_neuron_logit": "of the neuron-logit map",
            SQUARED: ("squared weights", ".4g"),
        }
        last = results.summary["steps"][-1]
        end = [row for row in results.rows(FREQUENCY_ROWS) if row["step"] == last]
        share_of = {(row["matrix"], row["frequency"]): row["share"] for row in end}
        ranked = sorted((row for row in end if row["matrix"] == W_E), key=lambda r: -r["share"])
        frequencies = [
            {
                "frequency": row["frequency"],
                "key": "key" if row["is_key"] else "",
                **{name: share_of.get((name, row["frequency"])) for name in MATRICES},
            }
            for row in ranked[:16]
        ]
        shown = {name: (words, ".1%") for name, words in MATRICES.items()}
        return [
            Table("Progress", columns, list(results.rows()), console=1),
            Table(
                f"Shares of the non-constant power at step {last}",
                {"frequency": "frequency", "key": "", **shown},
                frequencies,
                console=8,
            ),
        ]

    @classmethod
    def charts(cls, results: Results[ProgressOptions]) -> list[Chart]:
        rows = list(results.rows())
        accuracies = {f"{split}_accuracy": split for split in (TRAIN, TEST)}
        powers = list(results.rows(FREQUENCY_ROWS))
        return [
            _course("losses", "Loss of the answers, and of parts of the logits", rows, LOSSES),
            _course("accuracies", "Accuracy", rows, accuracies),
            _course("squared_weights", "Sum of squared weights", rows, {SQUARED: "all"}),
            *(
                chart(
                    f"frequencies_{name}",
                    f"{words}: share of each frequency in the non-constant power",
                    {f"frequencies_{name}": course},
                    *heat(f"frequencies_{name}", "share", tuple(course[0]), course, of="frequency"),
                    height=12 * (results.summary["modulus"] // 2),
                )
                for name, words in MATRICES.items()
                if (course := [row for row in powers if row["matrix"] == name])
            ),
        ]


def _course(name: str, title: str, rows: Sequence[Row], columns: dict[str, str]) -> Chart:
    """Columns over steps, a line each; losses on a logarithmic axis, where 0 has no place."""
    log, value = name == "losses", "nats" if name == "losses" else "value"
    points = [
        {"step": row["step"], "of": words, value: row[column]}
        for row in rows
        for column, words in columns.items()
        if row[column] > 0 or not log
    ]
    words = list(columns.values())
    line = lines(
        name,
        value,
        title if not log else "nats",
        colour("of", words),
        ("step", "of", value),
        log=log,
        dashed=last_dashed("of", words) if len(words) > 1 else None,
    )
    return chart(name, title, {name: points}, line, at_step())


def number_matrices(
    model: HookedTransformer, p: int
) -> dict[str, Float[Tensor, "number direction"]]:
    """`W_E`, and the last MLP's neuron-logit map `W_out W_U` if there is one, of the numbers."""
    matrices = {W_E: model.W_E[:p].cpu().double()}
    if not model.cfg.attn_only:
        w_out, w_u = model.blocks[-1].mlp.W_out, model.W_U[:, :p]
        matrices[NEURON_LOGIT] = (w_out.cpu().double() @ w_u.cpu().double()).T
    return matrices


def fewest(shares: Sequence[float], held: float = HELD) -> list[int]:
    """The fewest frequencies, from 1, whose shares sum to `held`; the largest first."""
    ranked = sorted(range(len(shares)), key=lambda k: -shares[k])
    total, count = 0.0, 0
    while count < len(ranked) and total < held:
        total += shares[ranked[count]]
        count += 1
    return [k + 1 for k in ranked[:count]]


def learned_at(rows: Sequence[Row], split: str) -> int | None:
    """The first checkpoint from which on a split's accuracy is at least `LEARNED`."""
    since = None
    for row in reversed(rows):
        if row[f"{split}_accuracy"] < LEARNED:
            break
        since = row["step"]
    return since


def _power_by_fft(parts: LogitParts, key: Sequence[int]) -> float:
    """Power of the logits at the frequencies (k, k) and (-k, -k) of a two-dimensional FFT.

    They are the waves of `a + b`: another way to the power of `LogitParts.key`.
    """
    p = len(parts.by_sum)
    transform = torch.fft.fft2(parts.logits.view(p, p, -1), dim=(0, 1), norm="ortho")
    at = sorted({sign * k % p for k in key for sign in (1, -1)})
    return float(transform[at, at].abs().square().sum())
