"""One sequence of the run's benchmark, and the attention of every head over it at some steps.

The only numbers of the page that no report holds: read from the checkpoints by `run_with_cache`,
rounded to four decimals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.page.panel import Missing, Panel, Source, thinned, training_command
from circuit.runs.checkpointed import CheckpointedRun
from circuit.tasks.examples import Examples, Split
from circuit.training.evaluate import logits_and_attention
from circuit.training.setup import Setup

STEPS = 25
"""Checkpoints that are looked at, at most."""
READS = 4
"""Reads of the sequence, at most."""
SEARCHED = 64
"""Records of the split among which the read of the largest slice (lag) is looked for."""
_DIGITS = 4


def example_panel(
    run: CheckpointedRun,
    home: str,
    winner: str | None,
    progress: Callable[[int, int], None] | None = None,
) -> Panel:
    """Attention from the reads of one sequence, at the chosen step; on the CPU.

    Args:
        winner: the head that is shown first; without one, that which looks most at supports at
            the last step.
        progress: called with the checkpoints done and their number.
    """
    head = (
        "example",
        "One sequence",
        "Where does a head look when the model has to answer, and what does the model say?",
    )
    train = training_command(home)
    if not run.steps:
        return Panel(*head, missing=[Missing("checkpoints of the run", train)])
    setup = run.setup.with_config(run.config.model_copy(update={"device": "cpu"}))
    split = run.config.tracked_splits[0] if run.config.tracked_splits else run.config.train_split
    try:
        setup.benchmark.records(split)
    except CircuitError as error:
        command = "circuit generate-benchmark --config configs/benchmark/NAME.json"
        missing = [Missing("the run's benchmark", command)]
        return Panel(*head, missing=missing, notes=[_told(error)])
    batch = _choose(setup.split(split))
    example = _look(run, setup, batch, progress)
    example["winner"] = winner or _looking(example)
    return Panel(
        *head,
        example=example,
        sources=[Source("checkpoints/", "checkpoints/step_*.pt", train)],
        notes=[
            f"{batch.sample_ids[0]} of {split}: the record with the largest"
            f" {batch.task.slice_name} among the first"
            f" {SEARCHED}. Attention is rounded to {_DIGITS} decimals; read from the checkpoints"
            " when the page was written."
        ],
    )


def _told(error: CircuitError) -> str:
    return f"Not drawn: {error.what}."


def _choose(records: Split) -> Examples:
    """The first record that holds a read of the largest lag (or first slice of another task)."""
    reads = records.batch(range(min(SEARCHED, len(records))))
    values = reads.slice_values()
    return records.batch([0 if values is None else int(reads.row[int(values.argmax())])])


def _look(
    run: CheckpointedRun,
    setup: Setup,
    batch: Examples,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """The sequence, its reads of the largest lags, and what each checkpoint makes of them."""
    setup.prepare()
    text = setup.benchmark.vocabulary.tokens
    values = batch.slice_values()
    same = torch.zeros_like(batch.at)
    ranked = (same if values is None else values).argsort(descending=True, stable=True)
    reads = sorted(ranked[:READS].tolist())
    at = batch.at[reads]
    payload: dict[str, Any] = {
        "sample_id": batch.sample_ids[0],
        "support": batch.task.support,
        "tokens": [text[token] for token in batch.tokens[0, : int(batch.lengths[0])].tolist()],
        "heads": setup.config.model.head_addresses,
        "reads": [_read(batch, read, text) for read in reads],
        "steps": thinned(run.steps, STEPS),
        "attention": [],
        "predictions": [],
    }
    for done, step in enumerate(payload["steps"], start=1):
        with torch.no_grad():
            model = setup.model(run.state(step))
            logits, attention = logits_and_attention(model, batch.tokens)
        weights = attention[0][:, at].double()  # [head, read, key]
        payload["attention"].append(
            [
                [
                    [round(w, _DIGITS) for w in row[: int(position) + 1]]
                    for row, position in zip(of_head, at.tolist(), strict=True)
                ]
                for of_head in weights.tolist()
            ]
        )
        best = logits[0, at].double().softmax(-1).max(-1)
        payload["predictions"].append(
            [
                {"token": text[token], "probability": round(probability, _DIGITS)}
                for token, probability in zip(
                    best.indices.tolist(), best.values.tolist(), strict=True
                )
            ]
        )
        if progress is not None:
            progress(done, len(payload["steps"]))
    return payload


def _looking(example: dict[str, Any]) -> str:
    """The head with the largest attention from the reads to their supports at the last step."""
    at = [read["support"] for read in example["reads"]]
    looks = [
        sum(weights[support] for weights, support in zip(of_head, at, strict=True))
        for of_head in example["attention"][-1]
    ]
    return str(example["heads"][looks.index(max(looks))])


def _read(batch: Examples, read: int, text: tuple[str, ...]) -> dict[str, Any]:
    return {
        "position": int(batch.at[read]),
        "support": int(batch.position(batch.task.support)[read]),
        "slices": {name: int(batch.facts[fact][read]) for name, fact in batch.task.slices.items()},
        "asked": text[int(batch.asked()[read])],
        "answer": text[int(batch.answer[read])],
    }
