"""series-scan: what can be seen of a series of checkpoints without any training data.

At every checkpoint, for every head, on strings of random tokens that stand twice in a sequence:
*prefix matching*, the attention from a token of the second string to the token that followed it in
the first; *previous-token attention* (definitions.md section 8). And of the weights alone how many
directions of `W_QK = W_Q W_K^T` and `W_OV = W_V W_O` are *born*: singular values beyond the largest
that the matrix has at the first checkpoint. Rotary positions stand between `W_Q` and `W_K` and are
left out of `W_QK`.

Every checkpoint is held against the others: equal weights under two steps are named, and a step
that is nearer to one before its predecessor than to its predecessor, as one that stands in the
wrong place is. Distances are those of a sketch, at most 4,096 numbers of each tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from circuit.artifacts import Row
from circuit.config import digest_of
from circuit.core.digests import tensors_digest
from circuit.errors import CircuitError
from circuit.figures.charts import Chart, at_step, chart, colour, lines
from circuit.lazy import no_grad, torch
from circuit.model.components import all_heads
from circuit.model.subspaces import head_factors, svd_of_product
from circuit.options import Option, Options
from circuit.reports.report import Findings, Report, Results
from circuit.reports.tables import Table
from circuit.scalars.base import Cache, SharedBatch
from circuit.scalars.induction import PREFIX, PREVIOUS, Attention
from circuit.sizes import require_memory
from circuit.training.series import CheckpointSeries

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens import HookedTransformer

MEASURES = {PREFIX: "prefix matching", PREVIOUS: "previous-token attention"}
BORN = {"qk_born": "W_QK", "ov_born": "W_OV"}
SKETCH = 4096
"""Numbers of a tensor by which distances are told."""
DRAWN = 6
"""Heads that have a line of their own."""
RISEN = 0.05
"""A measure that has risen by less over the series is not half way anywhere."""


class SeriesOptions(Options):
    """Which checkpoints, and what their heads are asked to repeat."""

    series: Annotated[
        tuple[Path, ...],
        Option(
            "Folder of checkpoints, or a checkpoint: weights of a HookedTransformer, or what"
            " save_pretrained wrote (GPT-2, GPT-NeoX).",
            kind="weights",
        ),
    ]
    task: Annotated[Literal["induction"], Option("What is looked for.", choices=("induction",))] = (
        "induction"
    )
    strings: Annotated[int, Option("Random strings, each twice in a row.", least=1)] = 16
    length: Annotated[
        int, Option("Tokens of a string, at most: half of what the model reads.", least=2)
    ] = 32
    seed: Annotated[int, Option("Of the random tokens.", least=0)] = 0


class SeriesScan(Report[SeriesOptions]):
    """What a series of checkpoints shows without training data: induction, spectra, duplicates."""

    command = "series-scan"
    Options = SeriesOptions
    names = ("series scan",)
    reads_run = False
    title = "A series of checkpoints"
    question = "When do heads begin to match prefixes, and which weights grow then?"

    def prepare(self) -> None:
        self.series = CheckpointSeries(self.options.series)
        self.bulk: dict[str, float] = {}
        self.digests: dict[int, str] = {}
        self.configs: dict[int, str] = {}
        self.sketches: dict[int, Tensor] = {}
        self.shapes: dict[str, list[int]] = {}
        self.gap = 0.0

    def points(self) -> Iterator[tuple[int, HookedTransformer]]:
        return self.series.models()

    @property
    def total(self) -> int:
        return len(self.series.steps)

    @no_grad
    def measure(self, point: tuple[int, HookedTransformer]) -> list[Row]:
        step, model = point
        parameters = dict(model.named_parameters())
        self._refuse_another(step, parameters)
        self.digests[step] = tensors_digest(parameters)
        self.configs[step] = digest_of({name: str(of) for name, of in vars(model.cfg).items()})
        self.sketches[step] = _sketch(parameters)
        heads = list(map(str, all_heads(model)))
        attention = self._attention(model, heads)
        return [
            {"step": step, "head": head, **attention[head], **self._born(model, head)}
            for head in heads
        ]

    def _refuse_another(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Hold a checkpoint's shapes against those of the first.

        Raises:
            CircuitError: it is of another model.
        """
        shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
        self.shapes = self.shapes or shapes
        for name in {**self.shapes, **shapes}:
            if shapes.get(name) != self.shapes.get(name):
                raise CircuitError(
                    f"{name} has shape {shapes.get(name, 'none')}",
                    where=self.series.members[step],
                    expected=f"{self.shapes.get(name, 'none')}, as at step {self.series.steps[0]}",
                    fix="scan the checkpoints of each model by themselves",
                )

    def _attention(self, model: HookedTransformer, heads: list[str]) -> dict[str, dict[str, float]]:
        asked, cfg = self.options, model.cfg
        positions = min(2 * asked.length, cfg.n_ctx)
        # at the least: of every token its logits, and a row of every head's pattern
        token = cfg.d_vocab + cfg.n_layers * cfg.n_heads * positions
        require_memory({"reading strings (strings, length)": 4 * asked.strings * positions * token})
        tokens = repeated(cfg.d_vocab, cfg.n_ctx, asked)
        scalars = [scalar for head in heads for scalar in matching(head, tokens)]
        shared = SharedBatch.merge(scalars)
        runs = shared.run(model)
        by_head: dict[str, dict[str, float]] = {head: {} for head in heads}
        for scalar, rows in zip(scalars, shared.rows, strict=True):
            cache = Cache(runs, rows)
            sums = cache[scalar.hook][:, scalar.component.head].double().sum(-1)
            self.gap = max(self.gap, float((sums - 1).abs().max()))
            measure = scalar.name.partition(".")[0]
            value = scalar.values(model, cache).double().mean()
            by_head[str(scalar.component)][measure] = float(value)
        return by_head

    def _born(self, model: HookedTransformer, head: str) -> dict[str, int]:
        component = next(one for one in all_heads(model) if str(one) == head)
        born = {}
        for name, circuit in (("qk_born", "qk"), ("ov_born", "ov")):
            _, values, _ = svd_of_product(*head_factors(model, component, circuit))  # type: ignore[arg-type]
            bulk = self.bulk.setdefault(f"{head} {name}", float(values[0]))
            born[name] = int((values > bulk).sum())
        return born

    def conclude(self, rows: list[Row]) -> Findings:
        steps = self.series.steps
        copies = _copies(self.digests)
        backwards = _backwards(self.sketches, {step for same in copies for step in same})
        summary = {
            "steps": steps,
            "equal": copies,
            "backwards": backwards,
            **{measure: _course(rows, measure) for measure in MEASURES},
        }
        law = (
            f"{len(steps)} checkpoints, {sum(map(len, copies)) - len(copies)} of them copies of"
            f" another; attention from every position sums to 1, to {self.gap:.1g}"
        )
        return Findings(rows, summary, law)

    def provenance(self) -> dict[str, Any]:
        told = {"parameters_sha256": self.digests, "config_sha256": self.configs}
        return {name: {str(step): of for step, of in by.items()} for name, by in told.items()}

    @classmethod
    def notes(cls, results: Results[SeriesOptions]) -> list[str]:
        summary, notes = results.summary, []
        for measure, words in MEASURES.items():
            of = summary[measure]
            half = of["half_step"]
            since = "" if half is None else f", past half of its way from step {half} on"
            notes.append(
                f"Most {words} at the last checkpoint: {of['head']}, {of['last']:.3f}{since}."
            )
        for same in summary["equal"]:
            steps = ", ".join(map(str, same))
            notes.append(f"Steps {steps} have equal weights: they are one checkpoint.")
        for step, nearer in summary["backwards"]:
            notes.append(
                f"Step {step} is nearer to step {nearer} than to the step before it: one of them"
                " may stand in the wrong place."
            )
        return notes

    @classmethod
    def tables(cls, results: Results[SeriesOptions]) -> list[Table]:
        last = results.summary["steps"][-1]
        rows = [row for row in results.rows() if row["step"] == last]
        columns: dict[str, Any] = {
            "step": "step",
            "head": "head",
            **{name: (words, ".3f") for name, words in MEASURES.items()},
            **{name: f"{matrix}: directions born" for name, matrix in BORN.items()},
        }
        return [Table("Heads", columns, rows, console=len(rows))]

    @classmethod
    def charts(cls, results: Results[SeriesOptions]) -> list[Chart]:
        rows, last = list(results.rows()), results.summary["steps"][-1]
        charts = []
        born = {name: f"{matrix}: directions born" for name, matrix in BORN.items()}
        for name, words in {**MEASURES, **born}.items():
            final = {row["head"]: row[name] for row in rows if row["step"] == last}
            top = sorted(final, key=lambda head: (-final[head], head))[:DRAWN]
            data = [
                {"step": row["step"], "head": row["head"], name: row[name]}
                for row in rows
                if row["head"] in top
            ]
            course = lines(
                "heads", name, words, colour("head", sorted(top)), ("step", "head", name)
            )
            charts.append(chart(name, f"{words}, by head", {"heads": data}, course, at_step()))
        return charts


def repeated(vocabulary: int, context: int, options: SeriesOptions) -> Tensor:
    """Random strings, each twice in a row; no token stands twice in a string: `[string, pos]`.

    Raises:
        CircuitError: the model reads too little, or has too few tokens.
    """
    length = min(options.length, context // 2, vocabulary)
    if length < 2:
        raise CircuitError(
            f"the model reads {context} positions of {vocabulary} tokens",
            expected="room for two tokens twice",
        )
    generator = torch.Generator().manual_seed(options.seed)
    strings = [
        torch.randperm(vocabulary, generator=generator)[:length].clone()
        for _ in range(options.strings)
    ]
    return torch.stack(strings).repeat(1, 2)


def matching(head: str, tokens: Tensor) -> tuple[Attention, Attention]:
    """Prefix matching and previous-token attention of a head on repeated strings."""
    count, width = tokens.shape
    length, position = width // 2, torch.arange(width)
    sequences = tuple(map(tuple, tokens.tolist()))

    def attention(name: str, first: int, distance: int) -> Attention:
        query = position[first:].repeat(count)
        row = torch.arange(count).repeat_interleave(width - first)
        return Attention(name, head, sequences, row, query, position == query[:, None] - distance)

    # the token behind the same one in the first string stands `length - 1` before
    return attention(PREFIX, length, length - 1), attention(PREVIOUS, 1, 1)


def _sketch(parameters: Mapping[str, Tensor]) -> Tensor:
    parts = [p.detach().reshape(-1) for p in parameters.values()]
    return torch.cat([part[:: max(1, len(part) // SKETCH)][:SKETCH] for part in parts]).double()


def _copies(digests: dict[int, str]) -> list[list[int]]:
    """Steps with equal weights."""
    by_digest: dict[str, list[int]] = {}
    for step, digest in digests.items():
        by_digest.setdefault(digest, []).append(step)
    return [steps for steps in by_digest.values() if len(steps) > 1]


def _backwards(sketches: dict[int, Tensor], copied: set[int]) -> list[list[int]]:
    """Steps that are nearer to one before their predecessor, and that one; copies left out."""
    steps = [step for step in sketches if step not in copied]
    back = []
    for place in range(2, len(steps)):
        here = sketches[steps[place]]
        far = [float((here - sketches[step]).norm()) for step in steps[:place]]
        nearest = min(range(place), key=lambda at: far[at])
        if nearest < place - 1:
            back.append([steps[place], steps[nearest]])
    return back


def _course(rows: list[Row], measure: str) -> dict[str, Any]:
    """The head with most of a measure at the last checkpoint, and when it was half way there."""
    last = max(row["step"] for row in rows)
    best = max((row for row in rows if row["step"] == last), key=lambda row: row[measure])
    course = [(row["step"], row[measure]) for row in rows if row["head"] == best["head"]]
    middle = (course[0][1] + course[-1][1]) / 2
    risen = course[-1][1] - course[0][1] >= RISEN
    half = None
    for step, value in reversed(course):
        if value < middle or not risen:
            break
        half = step
    return {"head": best["head"], "first": course[0][1], "last": course[-1][1], "half_step": half}
