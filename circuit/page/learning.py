"""Panels from the run's own metrics: learning curves by split, and accuracy by slices."""

from __future__ import annotations

from collections.abc import Sequence

from circuit.artifacts import Row
from circuit.figures.charts import (
    CATEGORY,
    GREY,
    at_step,
    chart,
    colour,
    exact,
    fitted,
    lines,
    named,
    steps,
)
from circuit.figures.charts import of_slices as shade_of_slices
from circuit.lazy import alt
from circuit.page.panel import Missing, Panel, Record, Source, Table, pick, training_command
from circuit.tasks.base import Task

METRICS = "metrics.jsonl"
EVALUATED = (
    *("step", "split", "reads", "answer_accuracy", "value_accuracy", "token_accuracy", "loss"),
    *("answer_loss", "shortcut", "shortcut_accuracy", "shortcut_agreement"),
)
TRAINED = ("step", "loss", "token_accuracy", "lr", "grad_norm", "clip_factor")
SLICE = ("reads", "answer_accuracy", "shortcut_agreement")


def evaluations(rows: Sequence[Row]) -> list[Record]:
    """The evaluation rows."""
    return [pick(row, EVALUATED) for row in rows if row["kind"] == "evaluation"]


def batches(rows: Sequence[Row]) -> list[Record]:
    """The rows of training batches."""
    return [pick(row, TRAINED) for row in rows if row["kind"] == "train"]


def slice_names(rows: Sequence[Row]) -> list[str]:
    """What the figures are given apart by: the task's first slice, and those that vary in a split.

    Without an evaluation, `lag`: where the figures will stand.
    """
    evaluated = [row["by_slice"] for row in rows if row["kind"] == "evaluation"]
    if not evaluated:
        return ["lag"]
    names = list(evaluated[0])
    return names[:1] + [by for by in names[1:] if any(len(slices[by]) > 1 for slices in evaluated)]


def sliced(rows: Sequence[Row], by: str) -> list[Record]:
    """The evaluation rows' slices by the fact, one record each."""
    return [
        {"step": row["step"], "split": row["split"], by: value, **pick(of_slice, SLICE)}
        for row in rows
        if row["kind"] == "evaluation"
        for value, of_slice in row["by_slice"][by].items()
    ]


def learning_panel(rows: Sequence[Row], home: str) -> Panel:
    """Answer accuracy and losses over training."""
    evaluated = evaluations(rows)
    trained = batches(rows)
    splits = _unique(evaluated, "split")
    shade = colour("split", splits)
    data = {"evaluation": evaluated, "training": trained}
    accuracy = lines(
        *("evaluation", "answer_accuracy", "answer accuracy", shade, EVALUATED), domain=[0, 1]
    )
    scale = fitted(row["loss"] for row in (*evaluated, *trained))
    drawn = _loss("next-token loss, nats", GREY, scale)
    loss = lines("evaluation", "loss", "next-token loss, nats", shade, EVALUATED)
    return Panel(
        "learning",
        "Learning curves",
        "When does the model learn to answer, and does it carry over to the other splits?",
        charts=[
            chart("accuracy", "Answer accuracy by split", data, accuracy, at_step()),
            chart("loss", "Loss by split; grey: training batches", data, drawn, loss, at_step()),
        ],
        tables=[_table()],
        data=data,
        sources=[_source(home)] if evaluated else [],
        missing=[] if evaluated else [_missing(home)],
    )


def loss_panel(rows: Sequence[Row], train: str) -> Panel:
    """The loss of training batches, which is all that the metrics of a recipe's run have.

    Args:
        train: the command that trains the run again.
    """
    data = {"training": batches(rows)}
    drawn = _loss("loss", CATEGORY[0], fitted(row["loss"] for row in data["training"]))
    return Panel(
        "learning",
        "Learning curve",
        "How fast does the loss of the batches fall?",
        charts=[chart("loss", "Loss of training batches", data, drawn, at_step())],
        data=data,
        sources=[Source(METRICS, METRICS, train)],
    )


def _loss(title: str, shade: str, scale: alt.Scale) -> alt.Chart:
    """A thin line, for batches are noisy; grey where splits are what is compared."""
    line = named("training").mark_line(color=shade, strokeWidth=1.2)
    drawn: alt.Chart = line.encode(
        x=steps(),
        y=alt.Y("loss:Q").scale(scale).axis(grid=False).title(title),
        tooltip=exact(*TRAINED),
    )
    return drawn


def slice_panel(rows: Sequence[Row], home: str, by: str, task: Task | None) -> Panel:
    """Accuracy of the reads of each value of a fact, against what a shortcut reaches.

    Args:
        task: of the run, where its benchmark is there.
    """
    whole, of_slices = evaluations(rows), sliced(rows, by)
    splits = _unique(whole, "split")
    charts = []
    for split in splits:
        where = f"datum.split === {split!r}"
        curve = named("whole").transform_filter(where)
        overall = curve.mark_line(color="var(--ink)", strokeWidth=2.2).encode(
            x=steps(), y="answer_accuracy:Q", tooltip=exact(*EVALUATED)
        )
        ceiling = curve.mark_line(color="var(--ink)", strokeDash=[5, 4]).encode(
            x=steps(), y="shortcut_accuracy:Q", tooltip=exact(*EVALUATED)
        )
        shade = shade_of_slices(by, of_slices)
        columns = ("step", "split", by, *SLICE)
        drawn = lines(
            *(by, "answer_accuracy", "answer accuracy", shade, columns),
            where=where,
            domain=[0, 1],
        )
        title = f"{split}: by {by}; bold: all reads; dashed: the shortcut's ceiling"
        layers = (ceiling, overall, drawn, at_step())
        charts.append(chart(f"{by}_{split}", title, {by: of_slices, "whole": whole}, *layers))
    return Panel(
        by,
        f"Accuracy by {by}, and the shortcut's ceiling",
        "Has the model learned the task, or a shortcut that is often right?",
        charts=charts,
        data={by: of_slices, "whole": whole},
        tables=[_slice_table(by)],
        sources=[_source(home)] if whole else [],
        missing=[] if whole else [_missing(home)],
        notes=[note for split in splits for note in _ceiling(whole, split, task)],
    )


def _ceiling(whole: Sequence[Record], split: str, task: Task | None) -> list[str]:
    last = [record for record in whole if record["split"] == split][-1]
    if last["shortcut"] is None:
        return []
    share = f"{100 * last['shortcut_accuracy']:.1f}\u00a0%"
    words = "" if task is None else task.shortcut_words
    says = f", '{words}'" if words else ", its k-th"
    return [
        f"The best shortcut of the task{says} with k = {last['shortcut']}, answers {share} of the"
        f" reads of {split}: accuracy up to that needs no circuit."
    ]


def _table() -> Table:
    return Table(
        "Evaluation",
        "evaluation",
        {
            "split": "split",
            "answer_accuracy": "answer accuracy",
            "value_accuracy": "value accuracy",
            "loss": "loss",
            "answer_loss": "answer loss",
        },
    )


def _slice_table(by: str) -> Table:
    return Table(
        f"Accuracy by {by}",
        by,
        {
            "split": "split",
            by: by,
            "reads": "reads",
            "answer_accuracy": "answer accuracy",
            "shortcut_agreement": "errors that equal the shortcut",
        },
    )


def _unique(records: Sequence[Record], column: str) -> list[str]:
    return list(dict.fromkeys(record[column] for record in records))


def _source(home: str) -> Source:
    return Source(METRICS, METRICS, training_command(home))


def _missing(home: str) -> Missing:
    return Missing("evaluation rows in metrics.jsonl", _source(home).command)
