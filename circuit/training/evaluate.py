"""Accuracies, losses and attention of a model on a split: whole, by token role and by slice.

Definitions 1, 3 and 6 of docs/definitions.md. All sums run in float64 over batches of a fixed
size, so a figure depends on the weights and the split alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from circuit.lazy import no_grad, torch
from circuit.model.readout import logits_of, read_answers
from circuit.tasks.base import Task
from circuit.tasks.examples import UNPREDICTED, Examples, Split

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens import HookedTransformer

BATCH = 256


@dataclass(frozen=True)
class Slice:
    """Reads of one kind."""

    reads: int
    answer_accuracy: float
    """Share whose argmax over the whole vocabulary is the answer."""
    shortcut_agreement: float | None
    """Share of the wrong answers that equal the best shortcut's value; null without errors."""


@dataclass(frozen=True)
class TokenRole:
    """Targets of one kind."""

    tokens: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """Every figure of one model on one split."""

    split: str
    records: int
    reads: int
    loss: float
    """Mean next-token loss in nats."""
    token_accuracy: float
    answer_loss: float
    """Mean of minus the log-probability of the answer over the whole vocabulary, nats."""
    answer_accuracy: float
    value_accuracy: float
    """Share whose argmax over the value tokens is the answer."""
    q: float | None
    """Mean over reads of the largest attention over all heads, from the prediction position to the
    task's attended role (lookup: the query key)."""
    r: float | None
    """The same to the task's support (the support value); null of a module that is no
    HookedTransformer."""
    w: float
    """Mean value margin: logit of the right value minus the best other value's."""
    shortcut: int | None
    """Which of the task's shortcuts, from 1, is right most often on this split (lookup: the k of
    'value of the k-th last write')."""
    shortcut_accuracy: float | None
    shortcut_agreement: float | None
    by_token_role: dict[str, TokenRole]
    by_slice: dict[str, dict[str, Slice]]

    def to_row(self) -> dict[str, Any]:
        """The figures as JSON."""
        return asdict(self)


def evaluate(
    model: HookedTransformer,
    split: Split,
    name: str,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a model on all records of a split.

    Args:
        name: the split's name, for the figures.
        progress: called with the split's name, the records done and their number.
    """
    parts = []
    for start in range(0, len(split), BATCH):
        stop = min(start + BATCH, len(split))
        batch = split.batch(torch.arange(start, stop))
        parts.append(_measure(model, batch))
        if progress is not None:
            progress(name, stop, len(split))
    measured = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return _combine(name, len(split), split.task, measured)


@no_grad
def _measure(model: HookedTransformer, batch: Examples) -> dict[str, Tensor]:
    """Per-target and per-read figures of one batch, on the CPU."""
    device, task = next(model.parameters()).device, batch.task
    tokens, attention = batch.tokens.to(device), None
    if hasattr(model, "hook_dict"):
        logits, attention = logits_and_attention(model, tokens)
    else:  # of another module's attention nothing is known
        logits = logits_of(model, tokens)
    targets = batch.targets().to(device)
    real = targets != UNPREDICTED
    exact = logits.double() if task.loss_dtype == "float64" else logits
    # one row a target: of [batch, vocab, pos] CUDA has no deterministic form
    rows = torch.nn.functional.cross_entropy(
        exact.flatten(0, 1), targets.flatten(), ignore_index=UNPREDICTED, reduction="none"
    )
    losses = rows.view_as(targets)
    at = logits[batch.row, batch.at].cpu().double()  # [example, vocab]
    answers = read_answers(at, batch.answer.cpu(), task.choices)
    attended = {}
    for name, role in (("q", task.attended), ("r", task.support)):
        if role is None or attention is None:
            continue
        weights = attention[batch.row, :, batch.at]  # [example, head, key position]
        mask = batch.role(role).to(device)[:, : weights.shape[-1]]
        attended[name] = torch.einsum("ehp,ep->eh", weights, mask.to(weights.dtype)).amax(1)
    measured = {
        "loss": losses[real].double(),
        "correct": (logits.argmax(-1) == targets)[real],
        "kind": batch.kinds[:, 1:][real.cpu()],
        "answer": batch.answer,
        "prediction": answers.prediction,
        "answer_loss": -answers.log_probability,
        "margin": answers.margin,
        **{name: batch.facts[name].long() for name in (*task.shortcuts, *task.slices.values())},
        **attended,
    }
    return {name: value.cpu() for name, value in measured.items()}


def logits_and_attention(model: HookedTransformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[batch, pos, vocab]` and attention of all heads `[batch, head, query, key]`."""
    logits, cache = model.run_with_cache(
        tokens[:, :-1],
        names_filter=lambda name: name.endswith("attn.hook_pattern"),
        return_cache_object=False,
    )
    return cast("Tensor", logits), torch.cat(list(cache.values()), dim=1)


def _combine(name: str, records: int, task: Task, m: dict[str, Tensor]) -> Evaluation:
    correct = m["prediction"] == m["answer"]
    by_shortcut = [_mean(m[shortcut] == m["answer"]) for shortcut in task.shortcuts]
    best = by_shortcut.index(max(by_shortcut)) if by_shortcut else None
    agrees = None if best is None else m["prediction"] == m[task.shortcuts[best]]
    return Evaluation(
        split=name,
        records=records,
        reads=len(correct),
        loss=_mean(m["loss"]),
        token_accuracy=_mean(m["correct"]),
        answer_loss=_mean(m["answer_loss"]),
        answer_accuracy=_mean(correct),
        value_accuracy=_mean(m["margin"] > 0),
        q=_mean(m["q"]) if "q" in m else None,
        r=_mean(m["r"]) if "r" in m else None,
        w=_mean(m["margin"]),
        shortcut=None if best is None else best + 1,
        shortcut_accuracy=None if best is None else by_shortcut[best],
        shortcut_agreement=_agreement(correct, agrees),
        by_token_role={
            kind: TokenRole(int(at.sum()), _mean(m["loss"][at]), _mean(m["correct"][at]))
            for index, kind in enumerate(task.kinds)
            if (at := m["kind"] == index).any()
        },
        by_slice={
            kind: {
                str(value): _slice(correct, agrees, m[fact] == value)
                for value in torch.unique(m[fact]).tolist()
            }
            for kind, fact in task.slices.items()
        },
    )


def _slice(correct: Tensor, agrees: Tensor | None, at: Tensor) -> Slice:
    of_slice = None if agrees is None else agrees[at]
    return Slice(int(at.sum()), _mean(correct[at]), _agreement(correct[at], of_slice))


def _agreement(correct: Tensor, agrees: Tensor | None) -> float | None:
    wrong = ~correct
    return _mean(agrees[wrong]) if agrees is not None and wrong.any() else None


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
