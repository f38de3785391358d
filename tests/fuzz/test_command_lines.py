"""Configs and command lines of every kind: done, and exactly; or refused in one line."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer.main
from circuit.cli.program import program
from each_report import GOOD
from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis import strategies as st
from law import in_parts, renewed, typed

from circuit.tasks.symbolic_kv.config import BenchmarkConfig
from circuit.train_config import TrainConfig

Json = dict[str, Any]
Strategy = st.SearchStrategy[Any]
Words = tuple[str, ...]
PHASES = (Phase.explicit, Phase.generate)
TEXTS = ["", " ", "x", "L1H0", "validation_iid", "train", "a" * 300, "\u00e9\u202e", "~", "."]
TEXTS += ["$(touch executed)", "<script>", "a|b\nc", "-x", "=1+1", "no/x", "\x1b[31m", "[red]"]
NUMBERS: list[Any] = [0, -1, 2, 1.5, -0.0, 5e-324, 1e308, 2**32, 2**53, 2**63, 10**30, 10**400]
"""Tiny or absurd: what lies between is honest work, and slow."""
DEEP = json.loads("[" * 400 + "]" * 400)
OTHERS = [None, True, [], {}, [[]], {"a": {}}, DEEP, "\ud800", "\0", *NUMBERS, *TEXTS]
hostile = st.sampled_from(OTHERS) | st.integers(-3, 9) | st.text(max_size=6)
names = st.sampled_from(["validation_iid", "train", "out", "\u00e9 x"])


def small(schema: Json, definitions: Json) -> Strategy:
    """Values of a JSON schema, near its least ones."""
    if "$ref" in schema:
        return small(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return st.one_of([small(one, definitions) for one in schema[key]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    least = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    most = min(schema.get("maximum", least + 4), least + 4)
    fields = {n: small(one, definitions) for n, one in schema.get("properties", {}).items()}
    needed = {name: fields.pop(name) for name in schema.get("required", [])}
    inner = schema.get("items") or schema.get("additionalProperties")
    item = small(inner, definitions) if inner else hostile
    has_fields = bool(needed or fields)
    of_type: dict[str, Strategy] = {
        "null": st.none(),
        "boolean": st.booleans(),
        "integer": st.integers(least, most),
        "number": st.floats(least, most),
        "string": names,
        "array": st.lists(item, max_size=2),
        "object": st.fixed_dictionaries(needed, optional=fields)
        if has_fields
        else st.dictionaries(names, item, max_size=2),
    }
    return of_type.get(schema.get("type", ""), hostile)


def fields_of(kind: type[TrainConfig | BenchmarkConfig]) -> dict[str, Strategy]:
    """Small values of every field of a config."""
    schema = kind.model_json_schema()
    return {n: small(s, schema.get("$defs", {})) for n, s in schema["properties"].items()}


def holders(node: Json) -> list[Json]:
    """The objects of a config that hold fields."""
    return [
        node,
        *(h for inner in node.values() if isinstance(inner, dict) for h in holders(inner)),
    ]


@st.composite
def configs(draw: st.DrawFn, base: Json, fields: dict[str, Strategy]) -> bytes:
    """The text of a config: that of the tiny one, some fields changed, perhaps damaged."""
    payload = copy.deepcopy(base)
    for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=1)):
        payload[name] = draw(fields[name])
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2]))):
        node = draw(st.sampled_from([one for one in holders(payload) if one]))
        name = draw(st.sampled_from(sorted(node)))
        kept = node.pop(name) if draw(st.booleans()) else draw(hostile)
        if draw(st.integers(0, 3)):
            node[name if name in node or draw(st.booleans()) else draw(st.text(max_size=4))] = kept
    data = json.dumps(payload).encode()
    at = draw(st.integers(0, len(data) - 1))
    damages = {
        "twice": b'{"seed": 1, ' + data[1:],
        "cut": data[:at],
        "byte": data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :],
        "digits": data.replace(b'"seed": ', b'"seed": ' + b"9" * 5000, 1),
        "utf-16": json.dumps(payload).encode("utf-16"),
        "deep": b'{"a":' * 60_000,
        "nan": data.replace(b'"seed": ', b'"seed": NaN, "y": ', 1),
        "bom": b"\xef\xbb\xbf" + data,
    }
    return damages.get(draw(st.sampled_from(["none"] * 40 + list(damages))), data)


CONFIG = ("--config", "c.json")
BEST = ("--checkpoint", "runs/tiny/checkpoints/best.pt")
TRACED = ("train", *CONFIG, "--stop-at-step", "2", "--trace", "t")
START = ("--from-initialization", "--num-steps", "1", "--output-dir", "t")
READERS = [TRACED, TRACED, TRACED, ("train", *CONFIG, "--stop-at-step", "1", "--resume")]
READERS += [("evaluate", *CONFIG, *BEST), ("export", *CONFIG, *BEST, "--output-dir", "e")]
READERS += [("trace", "record", *CONFIG, *START)]
FIELDS = ["steps", "seed", "model.heads", "optimizer.name", "optimizer.beta1", "schedule", "best"]
FIELDS += ["", ".", "model.x.y", "tracked_splits", "splits.train.samples", "num_keys"]
fields = st.sampled_from(FIELDS) | st.text("a.=", max_size=4)
overrides = st.tuples(fields, hostile.map(json.dumps) | st.sampled_from(TEXTS)).map("=".join)


@st.composite
def config_cases(draw: st.DrawFn, kinds: list[Strategy]) -> tuple[bytes, Words]:
    """The text of a config, and a command that reads it."""
    of_run = draw(st.integers(0, 4)) > 0
    words = draw(st.sampled_from(READERS)) if of_run else ("generate-benchmark", *CONFIG)
    given = draw(st.lists(overrides, max_size=2)) if draw(st.integers(0, 5)) == 0 else []
    return draw(kinds[of_run]), (*words, *(word for text in given for word in ("--set", text)))


# --- command lines ------------------------------------------------------------------------------

LONG = {"quickstart", "reproduce"}
"""Commands that train for minutes, whatever is said to them."""
PATHS = ["tiny.json", "benchmark.json", "runs/tiny", "trace", "data/tiny", "runs", "new/deep"]
PATHS += ["runs/tiny/checkpoints", "runs/tiny/metrics.jsonl", "trace/trace.json", "/dev/null"]
PATHS += [BEST[1], "runs/tiny/analysis/probe_set.jsonl", "runs/tiny/formation.html"]
COUNTS = ["0", "-1", "1", "3", "12", "1.5", "nan", "inf", "\u0663", "9" * 30, "1e999", " 2"]
GIVEN: Json = {**GOOD, "config": "tiny.json", "benchmark_dir": "data/tiny", "folder": "trace"}
GIVEN |= {"run": "runs/tiny", "output_dir": "new", "edits_file": "edits.jsonl"}
GIVEN |= {"replays": ("queue", "judged", "new"), "runs_dir": ("left", "new"), "part": "1/2"}
GIVEN |= {"recipe": "mine.py:Sums", "module": "mine.py:build", "folder": ("trace", "mine", "own")}
GIVEN |= {"scalars": ("loss", "mine.py:loss"), "series": "series", "scores": "theirs.npz"}
GIVEN |= {"edits": ("a,scale=weight_decay*0", "a,freeze=L0", "a,set=rate*0.5,steps=0:1")}
GIVEN |= {"config": ("tiny.json", "mine", "own"), "by": "position", "windows": "0:2"}
"""Many of these stand in the wide world alone."""


def leaves(command: Any, words: Words = ()) -> list[tuple[Words, Any]]:
    """Every command, with the words that name it."""
    inner = getattr(command, "commands", None)
    if inner is None:
        return [(words, command)]
    kept = [(name, one) for name, one in inner.items() if name not in LONG]
    return [leaf for name, one in kept for leaf in leaves(one, (*words, name))]


@st.composite
def lines(draw: st.DrawFn, commands: list[tuple[Words, Any]]) -> Words:
    """A command with some of its options, mostly those that it needs."""
    chosen, command = draw(st.sampled_from(commands))
    for parameter in command.params:
        if draw(st.integers(0, 19)) < (1 if parameter.required else 19):
            continue
        good = GIVEN.get(parameter.name, ("new", 3))
        good = [str(one) for one in (good if isinstance(good, tuple) else (good,))]
        if parameter.param_type_name == "option":
            chosen = (*chosen, draw(st.sampled_from(parameter.opts)))
        if not getattr(parameter, "is_flag", False):
            often = draw(st.integers(0, 9))
            chosen = (*chosen, draw(st.sampled_from(good if often else COUNTS + TEXTS + PATHS)))
    return (*chosen, *draw(st.sampled_from([()] * 9 + [("--no-such",), ("x",), ("--",), ("-h",)])))


@pytest.mark.parametrize(
    ("count", "part"), [(20, 0), *in_parts((400, part) for part in range(1, 6))]
)
def test_whatever_is_said_is_done_exactly_or_refused_in_one_line(
    count: int, part: int, place: Path, world: Path
) -> None:
    pairs = {"benchmark.json": BenchmarkConfig, "tiny.json": TrainConfig}
    bases = {name: json.loads((world / name).read_text()) for name in pairs}
    bases["tiny.json"]["output_dir"] = "runs/new"  # that of the world has its files
    kinds: list[Strategy] = [configs(bases[n], fields_of(kind)) for n, kind in pairs.items()]
    commands = lines(leaves(typer.main.get_command(program())))
    codes: Counter[Any] = Counter()
    breaches = []

    @settings(max_examples=count, phases=PHASES, suppress_health_check=list(HealthCheck))
    @example((json.dumps(bases["tiny.json"]).encode(), TRACED))
    @seed(part)
    @given(config_cases(kinds) | st.tuples(st.just(b"{}"), commands))
    def check(case: tuple[bytes, Words]) -> None:
        data, words = case
        renewed(world, place)
        Path("c.json").write_bytes(data)
        done = typed([os.fsdecode(word.encode("utf-8", "surrogatepass")) for word in words])
        codes[done.code] += 1
        broken = [done.breach, *(path.name for path in Path().rglob("executed*"))]
        if words[: len(TRACED)] == TRACED and done.code == 0:
            again = typed(("trace", "verify", "t"))
            codes["replayed"] += again.code == 0
            broken.append(again.breach or (again.code and f"differs: {again.out}") or "")
        if any(broken):
            breaches.append(f"{''.join(broken)}\n{data[:1500]!a}")

    check()
    print(
        f"configs and command lines: {count} drawn, {codes[0]} done, {codes[2]} refused;"
        f" {codes['replayed']} replayed, 0 bits different; tracebacks and hangs {len(breaches)}"
    )
    assert breaches == [], "\n\n".join(breaches[:40])
    assert codes[0] >= count / 20
    assert codes["replayed"]
