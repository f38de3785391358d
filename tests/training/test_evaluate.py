"""Evaluation against loops over single records, single reads and single heads."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from circuit.model.build import build_model
from circuit.tasks.base import Record
from circuit.tasks.benchmark import Benchmark
from circuit.tasks.examples import Split
from circuit.train_config import TrainConfig
from circuit.training import evaluate as module
from circuit.training.evaluate import Evaluation, evaluate
from circuit.training.session import TrainingSession
from circuit.training.setup import encode_split

SPLITS = ("train", "validation_iid", "heldout_pairs")
Reads = list[dict[str, Any]]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def share(reads: Reads, key: str) -> float:
    return mean([float(read[key]) for read in reads])


def agreement(reads: Reads, shortcut: int) -> float | None:
    wrong = [read for read in reads if not read["right"]]
    return (
        mean([float(r["prediction"] == r["last"].get(shortcut)) for r in wrong]) if wrong else None
    )


def log_softmax(scores: Tensor) -> list[float]:
    numbers = scores.double().tolist()
    top = max(numbers)
    total = top + math.log(math.fsum(math.exp(number - top) for number in numbers))
    return [number - total for number in numbers]


def naive(model: HookedTransformer, benchmark: Benchmark, split: str) -> dict[str, Any]:
    """Every figure from the text of each record, one record at a time, without padding."""
    targets: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    reads: Reads = []
    for record in benchmark.records(split):
        with torch.no_grad():
            logits, cache = model.run_with_cache(torch.tensor([record.tokens]))
        heads = [
            cache[f"blocks.{layer}.attn.hook_pattern"][0, head]
            for layer in range(model.cfg.n_layers)
            for head in range(model.cfg.n_heads)
        ]
        reads += reads_of(benchmark, record, logits[0], heads, targets)
    return summarize(split, len(benchmark.records(split)), targets, reads)


def reads_of(
    benchmark: Benchmark,
    record: Record,
    logits: Tensor,
    heads: list[Tensor],
    targets: dict[str, list[tuple[float, bool]]],
) -> Reads:
    vocab = benchmark.vocabulary
    words = vocab.decode(record.tokens).split()
    writes: list[tuple[str, str, int]] = []
    found: Reads = []
    active = len({words[i + 1] for i in range(1, len(words) - 1, 3) if words[i] == "W"})

    def target(position: int, role: str) -> None:
        scores, token = logits[position - 1], record.tokens[position]
        targets[role].append((-log_softmax(scores)[token], int(scores.argmax()) == token))

    for op in range(1, len(words) - 1, 3):
        key, value = words[op + 1], words[op + 2]
        target(op, "op")
        if words[op] == "W":
            target(op + 1, "write_key")
            target(op + 2, "write_value")
            writes.append((key, value, op + 2))
            continue
        target(op + 1, "read_key")
        target(op + 2, "answer")
        support = max(i for i, write in enumerate(writes) if write[0] == key)
        assert writes[support][1] == value
        scores = logits[op + 1]
        values = {token: float(scores[vocab.encode(token)[0]]) for token in vocab.tokens[-32:]}
        assert next(iter(values)) == "V00"
        prediction = vocab.tokens[int(scores.argmax())]
        found.append(
            {
                "prediction": prediction,
                "right": prediction == value,
                "value_right": max(values, key=lambda token: values[token]) == value,
                "w": values[value] - max(s for token, s in values.items() if token != value),
                "answer_loss": -log_softmax(scores)[record.tokens[op + 2]],
                "q": max(float(head[op + 1, op + 1]) for head in heads),
                "r": max(float(head[op + 1, writes[support][2]]) for head in heads),
                "lag": len(writes) - 1 - support,
                "active_keys": active,
                "writes_before": len(writes),
                "heldout": int(vocab.encode(f"{key} {value}") in benchmark.task.heldout_pairs),
                "last": {k: writes[-k][1] for k in range(1, min(len(writes), 6) + 1)},
                "value": value,
            }
        )
    target(len(words) - 1, "eos")
    return found


def summarize(
    split: str, records: int, targets: dict[str, list[tuple[float, bool]]], reads: Reads
) -> dict[str, Any]:
    shortcuts = {
        k: mean([float(read["last"].get(k) == read["value"]) for read in reads])
        for k in range(1, 7)
    }
    best = max(shortcuts, key=lambda k: (shortcuts[k], -k))
    slices: dict[str, dict[str, Any]] = {}
    for kind in ("lag", "active_keys", "writes_before", "heldout"):
        slices[kind] = {}
        for value in sorted({read[kind] for read in reads}):
            chosen = [read for read in reads if read[kind] == value]
            slices[kind][str(value)] = {
                "reads": len(chosen),
                "answer_accuracy": share(chosen, "right"),
                "shortcut_agreement": agreement(chosen, best),
            }
    every = [pair for pairs in targets.values() for pair in pairs]
    return {
        "split": split,
        "records": records,
        "reads": len(reads),
        "loss": mean([loss for loss, _ in every]),
        "token_accuracy": mean([float(hit) for _, hit in every]),
        "answer_loss": share(reads, "answer_loss"),
        "answer_accuracy": share(reads, "right"),
        "value_accuracy": share(reads, "value_right"),
        "q": share(reads, "q"),
        "r": share(reads, "r"),
        "w": share(reads, "w"),
        "shortcut": best,
        "shortcut_accuracy": shortcuts[best],
        "shortcut_agreement": agreement(reads, best),
        "by_token_role": {
            role: {
                "tokens": len(pairs),
                "loss": mean([loss for loss, _ in pairs]),
                "accuracy": mean([float(hit) for _, hit in pairs]),
            }
            for role, pairs in targets.items()
        },
        "by_slice": slices,
    }


def assert_close(found: Any, expected: Any, at: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), at
        for key in expected:
            assert_close(found[key], expected[key], f"{at}.{key}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), at
    else:
        assert found == expected, at


@pytest.mark.parametrize("steps", [0, 60])
def test_every_figure_is_that_of_a_loop_over_reads(
    tiny: Benchmark, session_after: Callable[..., TrainingSession], steps: int
) -> None:
    shape = {"layers": 2, "heads": 2, "d_model": 16, "d_ff": 32, "max_sequence_length": 40}
    model = session_after(steps, model=shape).model
    for split in SPLITS:
        found = evaluate(model, encode_split(tiny, split), split)
        assert_close(found.to_row(), naive(model, tiny, split), split)
        if steps:
            assert found.answer_accuracy < 1  # so that the agreement of wrong answers is tried
            assert found.shortcut_agreement is not None
            assert found.token_accuracy > 0.2


def oracle(benchmark: Benchmark, split: Split, guess: str) -> Any:
    """A stand-in for a model, whose logits at each read point at the answer or a shortcut."""
    batch = split.batch()
    logits = torch.zeros(*batch.tokens.shape, benchmark.vocabulary.size)
    chosen = batch.answer
    if guess == "shortcut":
        chosen = batch.facts["last_write_2"]
    logits[batch.row, batch.at, chosen] = 9.0
    return logits[:, :-1]


@pytest.mark.parametrize("guess", ["answer", "shortcut"])
def test_a_model_that_answers_by_a_rule_gets_the_rules_figures(
    tiny: Benchmark,
    make_config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    guess: str,
) -> None:
    split = encode_split(tiny, "validation_iid")
    config = make_config()
    model = build_model(config.model, vocabulary_size=tiny.vocabulary.size, seed=0)

    def answered(_: HookedTransformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = oracle(tiny, split, guess)
        return logits, torch.zeros(len(tokens), 2, logits.shape[1], logits.shape[1])

    monkeypatch.setattr(module, "logits_and_attention", answered)
    found = evaluate(model, split, "validation_iid")
    assert (found.q, found.r) == (0.0, 0.0)
    if guess == "answer":
        assert found.answer_accuracy == found.value_accuracy == 1.0
        assert found.shortcut_agreement is None
        assert found.w == 9.0
        assert all(s.answer_accuracy == 1.0 for s in found.by_slice["lag"].values())
    else:  # the last-but-one write: right at lag 1 and nowhere else
        assert {lag: s.answer_accuracy for lag, s in found.by_slice["lag"].items()} == {
            lag: float(lag == "1") for lag in found.by_slice["lag"]
        }
        if found.shortcut == 2:
            assert found.shortcut_agreement == 1.0
            assert found.answer_accuracy == found.shortcut_accuracy


def test_figures_do_not_depend_on_how_a_split_is_cut_into_batches(
    tiny: Benchmark,
    session_after: Callable[..., TrainingSession],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, split = session_after(3).model, encode_split(tiny, "train")
    whole = evaluate(model, split, "train").to_row()
    done: list[tuple[str, int, int]] = []
    monkeypatch.setattr(module, "BATCH", 7)
    cut = evaluate(model, split, "train", progress=lambda *now: done.append(now))
    assert_close(cut.to_row(), whole)
    assert done == [("train", min(start + 7, 60), 60) for start in range(0, 60, 7)]


def test_evaluating_changes_neither_the_model_nor_the_next_step(
    tiny: Benchmark, session_after: Callable[..., TrainingSession]
) -> None:
    plain, evaluated = session_after(2), session_after(2)
    first: Evaluation = evaluate(evaluated.model, encode_split(tiny, "train"), "train")
    assert evaluate(evaluated.model, encode_split(tiny, "train"), "train") == first
    assert not evaluated.model.hook_dict["blocks.0.attn.hook_pattern"].fwd_hooks
    for session in (plain, evaluated):
        session.advance()
    for (name, ours), theirs in zip(
        plain.model.named_parameters(), evaluated.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
