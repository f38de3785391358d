"""Laws over every family of scalars, and over somebody's own module."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import RUN, MadeOnce, circuit, traced, traced_once, trained, trained_once

from circuit.artifacts import read_jsonl
from circuit.config import load_config
from circuit.errors import CircuitError
from circuit.model.readout import read_answers
from circuit.reports.inputs import Inputs, traced_inputs
from circuit.reports.scalar_attribution import ScalarAttributionOptions
from circuit.reports.traced import Scalars
from circuit.reports.written import read_report
from circuit.scalars.base import evaluate_scalar
from circuit.scalars.family import family_names, find_family, parse_scalars
from circuit.trace.replay import ReplayedRun
from circuit.train_config import TrainConfig
from circuit.training.step import next_token_loss

__all__ = ["MadeOnce", "circuit", "traced", "traced_once", "trained", "trained_once"]

Circuit = Callable[..., Any]
PROBES = RUN / "analysis/probe_set.jsonl"
BASE = ("--config", str(RUN), "--probe-set", str(PROBES), "--optimizer-trace-dir", "trace")
NEEDED = {
    "answer_scalar": "min_pairs_per_type=2",
    "functional_write": "source_component=L0H1,component=L1MLP,reference_step=6"
    ",min_pairs_per_type=2",
    "qk_match": "head=L1H0,rank=2,basis=step:6,min_route_pairs_per_type=2",
}
"""Of families that cannot do without on the tiny run."""
FAMILIES = family_names()
OF_ANOTHER_TASK = ("modular_addition",)
"""Attributed where their task has a run: tests/reports/test_modular_addition_progress.py."""
OWN = '''
from dataclasses import dataclass
from circuit.scalars.base import Needs
from circuit.scalars.loss import Loss


@dataclass(frozen=True)
class Norm:
    inputs: object
    layer: int
    constant = True
    needs = Needs((), ())

    @property
    def name(self):
        return f'"norm"\u2028L{self.layer}'

    def bind(self, model):
        return self

    def values(self, model, cache):
        return (model.W_in[self.layer] ** 2).sum()[None]


def several(inputs, layers: tuple[int, ...] = (0, 1)):
    return [Norm(inputs, layer) for layer in layers]


def nothing(inputs):
    return [3]


def no_inputs(*, layer=0):
    return []


SIZE = 3


def of_net(net):
    return net.W_in.square().sum()


def five(inputs):
    return 5


def none_at_all(inputs):
    return []


class Mine(Loss):
    """A family of one's own."""
'''


def word(name: str) -> str:
    return f"{name},{NEEDED[name]}" if name in NEEDED else name


@pytest.fixture
def attribute(circuit: Circuit, traced: Path) -> Circuit:
    """Types `circuit trace attribute` for some words over two steps."""

    def run(folder: str, *scalars: str, steps: tuple[int, int] = (5, 7)) -> Any:
        asked = [part for scalar in scalars for part in ("--scalar", scalar)]
        window = ("--start-step", str(steps[0]), "--end-step", str(steps[1]))
        return circuit("trace", "attribute", *BASE, *window, *asked, "--output-dir", folder)

    return run


@pytest.fixture
def inputs(traced: Path) -> Inputs:
    config = load_config(RUN / "run_config.json", TrainConfig)
    return traced_inputs(config, PROBES, ReplayedRun.open(traced))


def mean(family: Scalars, inputs: Inputs, step: int, place: int = 0) -> float:
    """A scalar at a step, bound there."""
    scalar = family.build(inputs)[place]
    with torch.no_grad():
        return float(evaluate_scalar(scalar, inputs.point(step).model).mean())


def test_the_families_are_those_that_the_guide_names() -> None:
    assert {"qk_match", "functional_write", "answer_scalar", "loss"} <= set(FAMILIES)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OF_ANOTHER_TASK])
def test_every_family_is_attributed_from_the_command_line(
    attribute: Circuit, inputs: Inputs, name: str
) -> None:
    done = attribute("out", word(name))
    assert (done.code, done.err) == (0, "")
    report = read_report(Path("out/scalar_attribution_report.json"))
    assert " ".join(done.out.split()).endswith(report.law)
    options = report.results.options
    assert options.scalars == (word(name),)
    assert ScalarAttributionOptions.from_json(options.to_json()) == options
    rows = read_jsonl(report.file())
    assert {row["step"] for row in rows} == {6, 7}
    for row in rows:
        # the terms close: along the path they sum to what happened, better than at first order
        off = {
            kind: abs(sum(row[kind].values()) - row["actual"]) for kind in ("path", "first_order")
        }
        assert row["actual"] != 0
        assert off["path"] <= max(1e-3 * abs(row["actual"]), 2e-6)
        assert off["path"] <= max(off["first_order"], 2e-6)
        for groups in row["groups"].values():
            by_group = sum(sum(kinds["path"].values()) for kinds in groups.values())
            assert by_group == pytest.approx(sum(row["path"].values()), rel=1e-9, abs=1e-12)
    # and the value is the scalar's own
    family = parse_scalars(word(name))
    assert rows[0]["before"] == pytest.approx(mean(family, inputs, 5), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_options_of_every_family_round_trip(name: str) -> None:
    kind = find_family(name)
    assert kind is not None
    family = parse_scalars(word(name))
    assert isinstance(family, kind)
    assert kind.from_json(family.to_json()) == family
    # its words are those of the flags: the same options from what they say
    words = family.words()
    pairs = zip(words[::2], words[1::2], strict=True)
    typed = [f"{flag.removeprefix('--').replace('-', '_')}={value}" for flag, value in pairs]
    assert parse_scalars(",".join([name, *typed])) == family
    with pytest.raises(CircuitError, match=f"{name} has no 'nothing'; expected one of "):
        parse_scalars(f"{name},nothing=1")


def test_several_values_and_switches_of_a_word() -> None:
    family = parse_scalars("qk_match, head_layer=1, head=0, head=1, rank=2, by_lag=true")
    assert (family.heads, family.ranks, family.by_lag) == (("L1H0", "L1H1"), (2,), True)  # type: ignore[union-attr]


WRONG = {
    "nothing": "unknown scalar 'nothing'; expected one of answer_scalar, ",
    "loss,scope": "'scope' in 'loss,scope'; expected key=value",
    "loss,scope=lm": "loss, scope: 'lm'; expected 'full_lm' or 'answer'",
    "loss,scope=answer,scope=full_lm": "loss has 'scope' 2 times; expected once",
    "qk_match,rank=0": "qk_match, rank: 0; expected at least 1",
    "qk_match,head=L5H0": "no component 'L5H0'",
    "qk_match,basis=step:99": "step 99 of the trace is not addressable",
    "qk_match,head_layer=1": "qk_match, head: none with head_layer 1; expected a number",
    "functional_write": "functional_write, source_component: is missing",
    "answer_scalar,scalar=moving_answer_margin": "has a kink wherever the competitor changes",
    "answer_scalar,scalar=target_best_wrong_logit": "give target_step",
    "answer_scalar,source_step=99": "step 99 of the trace is not addressable",
    "nowhere_at_all:scalar": "module 'nowhere_at_all' cannot be imported",
    "own_scalars:missing": "own_scalars:missing: its module has no 'missing'; expected a",
    "own_scalars:SIZE": "own_scalars:SIZE: is of type int; expected a function or class",
    "own_scalars:of_net": "if it is a function of the module",
    "own_scalars:nothing": "own_scalars:nothing: gave 3, which has no name",
    "own_scalars:five": "own_scalars:five: gave 5, which has no name",
    "own_scalars:none_at_all": "own_scalars:none_at_all: gave no scalar; expected",
    "own_scalars:no_inputs": "own_scalars:no_inputs: takes no inputs; expected",
    "json:dumps": "json:dumps: raised TypeError: Object of type Inputs is not JSON serializable",
    "sys:getsizeof": "module 'sys' cannot be imported (ImportError: it has no file",
    "broken:scalar": "module 'broken' cannot be imported (SyntaxError: ",
    "failing:scalar": "module 'failing' cannot be imported (ZeroDivisionError: division by zero)",
    "own_scalars:nothing,layer=1": "takes no 'layer'; expected no key",
    "own_scalars:Norm": "own_scalars:Norm: needs 'layer'; add layer=...",
    "own_scalars:Norm,layer=one": "layer=one; expected a valid integer",
    "own_scalars:Mine,scope=lm": "own_scalars:Mine, scope: 'lm'",
}


@pytest.mark.parametrize(("spec", "message"), WRONG.items(), ids=list(WRONG))
def test_a_bad_word_is_one_line_and_writes_nothing(
    attribute: Circuit, spec: str, message: str
) -> None:
    Path("own_scalars.py").write_text(OWN)
    Path("broken.py").write_text("def")
    Path("failing.py").write_text("1 / 0")
    done = attribute("out", spec)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert message in done.err
    assert not list(Path("out").glob("scalar*_*"))


def test_scalars_of_ones_own_module(attribute: Circuit, inputs: Inputs) -> None:
    Path("own_scalars.py").write_text(OWN)
    done = attribute(
        "out", "own_scalars:several,layers=1", "own_scalars:Norm,layer=0", "own_scalars:Mine"
    )
    assert (done.code, done.err) == (0, "")
    rows = read_jsonl(Path("out/scalar_attribution_rows.jsonl"))
    assert [row["scalar"] for row in rows[:3]] == [
        '"norm"\u2028L1',
        '"norm"\u2028L0',
        "loss.full_lm",
    ]
    weights = inputs.point(5).model.W_in.detach()
    for row, layer in zip(rows, (1, 0), strict=False):
        assert row["before"] == pytest.approx(float((weights[layer] ** 2).sum()), rel=1e-5)
    facts = read_report(Path("out/scalar_attribution_report.json")).provenance["scalars"]
    assert len(facts) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", one["scalar_module_sha256"]) for one in facts)


def test_shards_join_unless_the_code_of_their_scalars_differs(
    attribute: Circuit, circuit: Circuit
) -> None:
    Path("own_scalars.py").write_text(OWN)
    for folder, steps in (("whole", (5, 7)), ("one", (5, 6)), ("two", (6, 7))):
        assert attribute(folder, "own_scalars:several", "loss", steps=steps).code == 0
    assert circuit("trace", "merge", "joined", "two", "one").code == 0
    joined, whole = (
        {path.name: path.read_bytes() for path in Path(folder).glob("*.[sm][vd]*")}
        | {"rows": Path(folder, "scalar_attribution_rows.jsonl").read_bytes()}
        for folder in ("joined", "whole")
    )
    assert joined == whole
    path = Path(str(sys.modules["own_scalars"].__file__))
    path.write_text(f"{path.read_text()}\n# another version\n")
    assert attribute("other", "own_scalars:several", "loss", steps=(6, 7)).code == 0
    refused = circuit("trace", "merge", "bad", "one", "other")
    assert (refused.code, "the shards differ in scalars" in refused.err) == (2, True)


def test_the_loss_is_that_of_training(inputs: Inputs) -> None:
    """Over all next tokens; over the answers, minus their mean log-probability."""
    batch, model = inputs.batch, inputs.point(5).model
    with torch.no_grad():
        logits = model(batch.tokens)
        whole = next_token_loss(logits[:, :-1], batch.targets())
    assert mean(parse_scalars("loss"), inputs, 5) == pytest.approx(float(whole), rel=1e-5)
    at = logits.log_softmax(-1)[batch.row, batch.at]
    answers = float(-at.gather(1, batch.answer[:, None]).mean())
    assert mean(parse_scalars("loss,scope=answer"), inputs, 5) == pytest.approx(answers, rel=1e-5)


def test_competitors_are_frozen_at_the_step_that_is_named(inputs: Inputs) -> None:
    spec = "answer_scalar,min_pairs_per_type=2,scalar=fixed_source_competitor_margin"
    spec += ",scalar=fixed_target_competitor_margin,source_step=3,target_step=9"
    family = parse_scalars(spec)
    batch = inputs.side(inputs.pairs(family), "clean")
    with torch.no_grad():
        at = {
            step: inputs.point(step).model(batch.tokens)[batch.row, batch.at] for step in (3, 6, 9)
        }
    values = inputs.vocabulary.value_ids
    for place, step in enumerate((3, 9)):
        wrong = read_answers(at[step], batch.answer, values).competitor
        margin = at[6].gather(1, batch.answer[:, None]) - at[6].gather(1, wrong[:, None])
        assert mean(family, inputs, 6, place) == pytest.approx(float(margin.mean()), abs=1e-5)
