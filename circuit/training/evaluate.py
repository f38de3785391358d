"""Accuracies, losses and attention of a model on a split: whole, by token role and by slice.

Definitions 1, 3 and 6 of docs/definitions.md. All sums run in float64 over batches of a fixed
size, so a figure depends on the weights and the split alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from circuit.lazy import no_grad, torch
from circuit.model.readout import read_answers
from circuit.tasks.positions import Batch, EncodedSplit, role_mask, shortcut_values
from circuit.tasks.symbolic_kv import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens import HookedTransformer

BATCH = 256
SHORTCUTS = range(1, 7)
TOKEN_ROLES = ("op", "write_key", "write_value", "read_key", "answer", "eos")


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
    q: float
    """Mean over reads of the largest attention over all heads, prediction position to query key."""
    r: float
    """The same to the support value."""
    w: float
    """Mean value margin: logit of the right value minus the best other value's."""
    shortcut: int
    """The k whose 'value of the k-th last write' is right most often on this split."""
    shortcut_accuracy: float
    shortcut_agreement: float | None
    by_token_role: dict[str, TokenRole]
    by_slice: dict[str, dict[str, Slice]]

    def to_row(self) -> dict[str, Any]:
        """The figures as JSON."""
        return asdict(self)


def evaluate(
    model: HookedTransformer,
    split: EncodedSplit,
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
        parts.append(_measure(model, batch, split.vocabulary))
        if progress is not None:
            progress(name, stop, len(split))
    return _combine(
        name, len(split), {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    )


@no_grad
def _measure(model: HookedTransformer, batch: Batch, vocab: Vocabulary) -> dict[str, Tensor]:
    """Per-target and per-read figures of one batch, on the CPU."""
    device = model.W_E.device
    tokens = batch.tokens.to(device)
    logits, attention = logits_and_attention(model, tokens)
    targets = tokens[:, 1:]
    real = targets != vocab.pad
    # one row a target: of [batch, vocab, pos] CUDA has no deterministic form
    rows = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    losses = rows.view_as(targets)
    read = _read_figures(logits, batch, vocab)
    for name, role in (("q", "query_key"), ("r", "support_value")):
        mask = role_mask(batch, role).to(device)[:, : attention.shape[-1]]
        weights = attention[batch.reads.row, :, batch.reads.key_pos]  # [read, head, key_pos]
        read[name] = torch.einsum("rhp,rp->rh", weights, mask.to(weights.dtype)).amax(1)
    shortcuts = [shortcut_values(batch, k) for k in SHORTCUTS]
    measured = {
        "loss": losses[real].cpu().double(),
        "correct": (logits.argmax(-1) == targets)[real],
        "role": _target_roles(batch, vocab)[real.cpu()],
        "answer": batch.reads.answer,
        "shortcuts": torch.stack(shortcuts, 1),
        "lag": batch.reads.lag,
        "active_keys": batch.reads.active_keys,
        "writes_before": batch.reads.writes_before,
        "heldout": batch.reads.is_heldout.long(),
        **read,
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


def _read_figures(logits: Tensor, batch: Batch, vocab: Vocabulary) -> dict[str, Tensor]:
    at = logits[batch.reads.row, batch.reads.key_pos].cpu().double()  # [read, vocab]
    found = read_answers(at, batch.reads.answer.cpu(), vocab.value_ids)
    return {
        "prediction": found.prediction,
        "answer_loss": -found.log_probability,
        "margin": found.margin,
    }


def _target_roles(batch: Batch, vocab: Vocabulary) -> Tensor:
    """Index into TOKEN_ROLES of every target, Int64 `[batch, pos - 1]` (padding: any)."""
    tokens = batch.tokens
    roles = torch.zeros_like(tokens)
    roles[tokens == vocab.eos] = TOKEN_ROLES.index("eos")
    for row, position, name in (
        (batch.writes.row, batch.writes.key_pos, "write_key"),
        (batch.writes.row, batch.writes.value_pos, "write_value"),
        (batch.reads.row, batch.reads.key_pos, "read_key"),
        (batch.reads.row, batch.reads.answer_pos, "answer"),
    ):
        roles[row, position] = TOKEN_ROLES.index(name)
    return roles[:, 1:]


def _combine(name: str, records: int, m: dict[str, Tensor]) -> Evaluation:
    correct = m["prediction"] == m["answer"]
    by_shortcut = (m["shortcuts"] == m["answer"][:, None]).double().mean(0)
    best = int(by_shortcut.argmax())
    agrees = m["prediction"] == m["shortcuts"][:, best]
    slices = {"lag": m["lag"], "active_keys": m["active_keys"]}
    slices |= {"writes_before": m["writes_before"], "heldout": m["heldout"]}
    return Evaluation(
        split=name,
        records=records,
        reads=len(correct),
        loss=_mean(m["loss"]),
        token_accuracy=_mean(m["correct"]),
        answer_loss=_mean(m["answer_loss"]),
        answer_accuracy=_mean(correct),
        value_accuracy=_mean(m["margin"] > 0),
        q=_mean(m["q"]),
        r=_mean(m["r"]),
        w=_mean(m["margin"]),
        shortcut=SHORTCUTS[best],
        shortcut_accuracy=float(by_shortcut[best]),
        shortcut_agreement=_agreement(correct, agrees),
        by_token_role={
            role: TokenRole(int(at.sum()), _mean(m["loss"][at]), _mean(m["correct"][at]))
            for index, role in enumerate(TOKEN_ROLES)
            if (at := m["role"] == index).any()
        },
        by_slice={
            kind: {
                str(int(value)): _slice(correct, agrees, values == value)
                for value in torch.unique(values)
            }
            for kind, values in slices.items()
        },
    )


def _slice(correct: Tensor, agrees: Tensor, at: Tensor) -> Slice:
    return Slice(int(at.sum()), _mean(correct[at]), _agreement(correct[at], agrees[at]))


def _agreement(correct: Tensor, agrees: Tensor) -> float | None:
    wrong = ~correct
    return _mean(agrees[wrong]) if wrong.any() else None


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
