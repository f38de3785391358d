"""What the study claims, held against the reports of a reproduction.

A claim is a sentence with a threshold in it. It holds, does not hold, or cannot be judged because a
report is missing or has not the numbers. Nothing is computed here but comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from circuit.strict_json import parse_json
from circuit.studies.ablation import COMPARISON, ROOT, WIDE_ROOT
from circuit.studies.commands import DONE, SPARSE
from circuit.studies.cross_seed import COMPARISON as SEEDS
from circuit.studies.cross_seed import ROOT as SEED_ROOT
from circuit.studies.jobs import Job, report_file
from circuit.studies.study import PAPER, Study
from circuit.training.run_folder import refuse_another_runs

Numbers = dict[str, float | int | str | None]
Verdict = tuple[bool, Numbers]
Reports = Callable[..., dict[str, Any]]
"""`report(kind, name)`: the summary of one report of the reference run."""


@dataclass(frozen=True)
class Claim:
    """One claim and what a reproduction says of it.

    Attributes:
        target: part of the study that it belongs to.
        statement: with its threshold.
        holds: null where it cannot be judged.
        numbers: that decide.
        note: why it cannot be judged.
    """

    target: str
    statement: str
    holds: bool | None
    numbers: Numbers
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class _MissingError(Exception):
    """A report or a number is not there."""


def judge(study: Study, root: Path, target: str) -> list[Claim]:
    """The claims of a target, in the order of the study.

    Args:
        root: folder that the study ran in.
    """
    parts = PAPER if target == "paper" else (target,)
    jobs = {(job.target, job.kind, job.name): job for job in study.jobs}
    reader = _Reader(root, jobs)
    found = []
    for part, statement, test in _CLAIMS:
        if part not in parts:
            continue
        try:
            holds, numbers = test(reader)
            found.append(Claim(part, statement, holds, numbers))
        except _MissingError as error:
            found.append(Claim(part, statement, None, {}, str(error)))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            found.append(
                Claim(part, statement, None, {}, f"the reports of this scale have no {error}")
            )
    return found


@dataclass(frozen=True)
class _Reader:
    root: Path
    jobs: Mapping[tuple[str, str, str], Job]

    def json(self, path: str) -> dict[str, Any]:
        try:
            payload = parse_json((self.root / path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise _MissingError(f"{path} is not there") from None
        refuse_another_runs(self.root / path, payload.get("provenance", {}))
        return dict(payload)

    def summary(self, kind: str, name: str = "", target: str = "reference") -> dict[str, Any]:
        """Summary of a report of the reference run."""
        job = self.jobs[target, kind, name or kind]
        return dict(self.json(job.outputs[-1])["summary"])

    def named(self, kind: str, start: str) -> dict[str, Any]:
        """Summary of the one instance of a kind whose name starts so."""
        for found_target, found_kind, name in self.jobs:
            if (found_target, found_kind) == ("reference", kind) and name.startswith(start):
                return self.summary(kind, name)
        raise _MissingError(f"no {kind} {start}")


def _learned(read: _Reader) -> Verdict:
    found = read.json(DONE)["evaluations"]["validation_iid"]
    numbers = {
        "answer_accuracy": found["answer_accuracy"],
        "best_shortcut": found["shortcut_accuracy"],
    }
    return found["answer_accuracy"] >= max(0.9, found["shortcut_accuracy"]), numbers


def _generalizes(read: _Reader) -> Verdict:
    found = read.json(f"{SPARSE}/evaluation/best.json")["evaluations"]["heldout_pairs"]
    return found["answer_accuracy"] >= 0.5, {"heldout_answer_accuracy": found["answer_accuracy"]}


def _replay(read: _Reader) -> Verdict:
    found = read.summary("optimizer_update_trace", "symbolic_kv_reference_formation")
    equal, ulps = len(found["historical_checkpoints_equal"]), found["max_rounding_ulps"]
    numbers = {"steps": found["steps"], "checkpoints_equal": equal, "residual_ulps": ulps}
    return equal > 0 and ulps <= 16, numbers


def _closure(window: Mapping[str, Any]) -> Verdict:
    closure = window["closure"]
    path, first = closure["path_absolute"], closure["first_order_absolute"]
    return path <= 0.01 and path < first, {"path": path, "first_order": first}


def _attribution_closes(read: _Reader) -> Verdict:
    return _closure(read.summary("trace_merge", "reference_L2H1")["windows"][0])


def _low_rank_birth(read: _Reader) -> Verdict:
    grown = max(read.summary("weight_svd_trace")["growth"]["W_QK"], key=lambda row: row["growth"])
    ratio = grown["last"] / grown["first"]
    rank = grown["effective_rank_first"], grown["effective_rank_last"]
    numbers: Numbers = {"head": grown["component"], "singular_value_ratio": ratio}
    numbers |= {"effective_rank_first": rank[0], "effective_rank_last": rank[1]}
    return ratio >= 2 and rank[1] < rank[0], numbers


def _readable(read: _Reader) -> Verdict:
    for row in read.summary("value_code_subspace")["readout"]:
        place = row["group_by"], row["position_role"], row["stage"]
        if place == ("answer_value", "prediction", "layer_2_post_mlp"):
            accuracy = row["last_lens_value_accuracy"]
            return accuracy >= 0.5, {
                "lens_accuracy": accuracy,
                "readable_from_step": row["lens_readable_from_step"],
            }
    raise _MissingError("no readout at layer_2_post_mlp")


def _last(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = max(summary["means"], key=lambda row: row["step"])
    return found


def _value_over_key(read: _Reader) -> Verdict:
    jobs = [name for _, kind, name in read.jobs if kind == "geometry_subspace_intervention"]
    key = next(name for name in jobs if name.startswith("key_remove"))
    equal = f"value_remove_{key.rsplit('_', 1)[1]}"
    kind = "geometry_subspace_intervention"
    value, other = (_last(read.summary(kind, name))["margin_drop"] for name in (equal, key))
    numbers = {"value_margin_drop": value, "key_margin_drop": other}
    return value > 0 and value >= 2 * other, numbers


def _keep(read: _Reader) -> Verdict:
    found = _last(read.named("geometry_subspace_intervention", "value_keep"))
    drop = found["answer_accuracy_drop"]
    numbers = {"accuracy": found["baseline_answer_accuracy"], "accuracy_drop": drop}
    return found["baseline_answer_accuracy"] >= 0.5 and drop <= 0.05, numbers


def _rescue(read: _Reader) -> Verdict:
    rescue = read.summary("value_code_transfer_rescue")["rescue"]["negative_answer_loss"]
    step = max(rescue["true_transfer"], key=int)
    own, shuffled = rescue["true_transfer"][step], rescue["shuffled_answer_value"][step]
    numbers = {"support": own, "shuffled": shuffled, "both": rescue["source_plus_context"][step]}
    return own >= 0.2 and own - shuffled >= 0.2, numbers


def _scalar_closure(read: _Reader) -> Verdict:
    fits = read.summary("route_to_scalar_closure")["fits"]
    by_name = {fit["scalar"]: fit["r_squared"] for fit in fits if fit["switch_bucket"] == "all"}
    chosen = {name: by_name[name] for name in ("correct_value_logit", "moving_answer_margin")}
    return chosen["correct_value_logit"] >= 0.5, dict(chosen)


def _optimizers(read: _Reader) -> dict[str, Any]:
    return dict(read.json(report_file(f"{ROOT}/comparison", COMPARISON))["summary"])


def _adamw_learns(read: _Reader) -> Verdict:
    accuracy = _optimizers(read)["runs"]["adamw_baseline"]["answer_accuracy"]
    return accuracy >= 0.9, {"answer_accuracy": accuracy}


def _require_learning(read: _Reader) -> None:
    """What SGD falls behind of has to be there."""
    if not _adamw_learns(read)[0]:
        raise _MissingError("AdamW has not learned the task here either")


def _sgd_does_not(read: _Reader) -> Verdict:
    runs = _optimizers(read)["runs"].values()
    own = [run for run in runs if run["group"].startswith("SGD") and run["diverged"] is None]
    _require_learning(read)
    best = max(own, key=lambda run: run["best_answer_accuracy"])
    numbers: Numbers = {"runs": len(own), "best_accuracy": best["best_answer_accuracy"]}
    return best["best_answer_accuracy"] < 0.5, numbers | {"best_run": best["run"]}


def _over_sgd(column: str) -> Callable[[_Reader], Verdict]:
    def test(read: _Reader) -> Verdict:
        _require_learning(read)
        runs = _optimizers(read)["runs"]
        others = [run for run in runs.values() if run["group"].startswith("SGD")]
        own = runs["adamw_baseline"][column]
        best = max(run[column] for run in others if run[column] is not None)
        return own > 0 and own >= 2 * best, {"adamw_baseline": own, "largest_of_sgd": best}

    return test


def _without_momentum(read: _Reader) -> Verdict:
    accuracy = _optimizers(read)["runs"]["adamw_beta1_0"]["answer_accuracy"]
    return accuracy >= 0.9, {"answer_accuracy": accuracy}


def _seeds(read: _Reader) -> dict[str, Any]:
    return dict(read.json(report_file(f"{SEED_ROOT}/comparison", SEEDS))["summary"])


def _repeats(column: str) -> Callable[[_Reader], Verdict]:
    def test(read: _Reader) -> Verdict:
        found = _seeds(read)
        seeds = len(found["seeds"])
        return found[column] == seeds, {"seeds": seeds, "in": found[column]}

    return test


def _moves(column: str) -> Callable[[_Reader], Verdict]:
    def test(read: _Reader) -> Verdict:
        found = _seeds(read)
        if len(found["seeds"]) < 2:
            raise _MissingError("one seed cannot show it")
        addresses = found[column]
        return len(addresses) > 1, {"addresses": ", ".join(addresses)}

    return test


def _seeds_close(read: _Reader) -> Verdict:
    found = _seeds(read)
    worst = {name: found[f"worst_{name}_closure"] for name in ("match", "write")}
    return max(worst.values()) <= 0.01, dict(worst)


def _any_rate(read: _Reader) -> Verdict:
    groups = read.json(report_file(f"{WIDE_ROOT}/comparison", COMPARISON))["summary"]["groups"]
    best = max(groups.values(), key=lambda group: group["best_answer_accuracy"] or 0)
    numbers: Numbers = {"best_accuracy": best["best_answer_accuracy"], "run": best["best_run"]}
    numbers["diverged"] = sum(group["diverged"] for group in groups.values())
    return (best["best_answer_accuracy"] or 0) >= 0.9, numbers


_CLAIMS: tuple[tuple[str, str, Callable[[_Reader], Verdict]], ...] = (
    ("reference", "the model learns the lookup: answer accuracy of at least 90 %, and above every"
     " positional shortcut", _learned),
    ("reference", "it extends to key-value pairs that it never saw: at least 50 %", _generalizes),
    ("reference", "the trace is the run's own past bit for bit, and the terms sum to each update"
     " within 16 units in the last place", _replay),
    ("reference", "path contributions close to 1 % step by step, closer than first order",
     _attribution_closes),
    ("reference", "a QK map is born at low rank: its largest singular value at least doubles while"
     " its effective rank falls", _low_rank_birth),
    ("reference", "the mature prediction position carries a readable value code: lens accuracy of"
     " at least 50 % after the last MLP", _readable),
    ("reference", "removing value identity costs at least twice the margin that key identity of"
     " equal rank costs", _value_over_key),
    ("reference", "keeping value identity at high rank is enough: at most 5 points of accuracy"
     " lost", _keep),
    ("reference", "the support's value code brings back what removal took, and a shuffled one does"
     " not (difference of at least 0.2 of the loss)", _rescue),
    ("reference", "the routes close the correct value logit: R² of at least 0.5", _scalar_closure),
    ("ablation", "AdamW learns within the budget: at least 90 %", _adamw_learns),
    ("ablation", "SGD at the contract's rates does not: below 50 % everywhere", _sgd_does_not),
    ("ablation", "QK separation: AdamW's is at least twice the largest of SGD",
     _over_sgd("qk_separation_last")),
    ("ablation", "OV progress: AdamW writes at least twice the answer logit of any SGD run",
     _over_sgd("answer_logit_write_last")),
    ("ablation", "AdamW learns without momentum too (beta1 = 0): at least 90 %", _without_momentum),
    ("cross-seed", "the matching role repeats in every seed", _repeats("head_role_repeats")),
    ("cross-seed", "its address moves between seeds", _moves("head_addresses")),
    ("cross-seed", "the writing role repeats in every seed", _repeats("write_role_repeats")),
    ("cross-seed", "its path moves between seeds", _moves("path_addresses")),
    ("cross-seed", "attributions of the winners close to 1 % over their windows", _seeds_close),
    ("sgd-wide", "SGD at some rate learns within the budget: at least 90 %", _any_rate),
)  # fmt: skip


def claims_page(claims: list[Claim], title: str) -> Iterator[str]:
    """Lines of the Markdown that says what held."""
    counts = {verdict: sum(c.holds is verdict for c in claims) for verdict in (True, False, None)}
    yield f"# {title}"
    yield ""
    yield (
        f"{counts[True]} claims hold, {counts[False]} do not, {counts[None]} could not be judged."
    )
    yield ""
    yield "| part | claim | holds | numbers |"
    yield "|---|---|---|---|"
    for claim in claims:
        yield (
            f"| {claim.target} | {claim.statement} | {verdict_of(claim)} |"
            f" {numbers_of(claim) or claim.note} |"
        )


def verdict_of(claim: Claim) -> str:
    """`yes`, `no` or `?`."""
    return {True: "yes", False: "**no**", None: "?"}[claim.holds]


def numbers_of(claim: Claim) -> str:
    """The numbers of a claim in one line."""
    shown = (
        f"{name.replace('_', ' ')} {value:.4g}"
        if isinstance(value, float)
        else f"{name.replace('_', ' ')} {value}"
        for name, value in claim.numbers.items()
    )
    return ", ".join(shown)
