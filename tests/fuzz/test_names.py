"""Folders and labels of any name: what is printed can be pasted, and no page or table breaks."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer.main
from circuit.cli.program import program
from each_report import GOOD
from law import WHOLE, in_parts, renewed, typed
from test_command_lines import Words, leaves
from test_flips import MATCH

PLAIN = "plain"
GIVEN: dict[str, Any] = {**GOOD, "separation_rows": f"{MATCH}_rows.jsonl", "output": "new"}
GIVEN |= {"config": "runs/tiny", "benchmark_dir": "data/tiny", "folder": "trace"}
GIVEN |= {"run": "runs/tiny", "output_dir": "new"}
GIVEN |= {"scalars": "loss", "from_initialization": True, "split": "train", "step": 3}
GIVEN |= {
    "anchor_every": 12,
    "start_step": 3,
    "end_step": 12,
    "examples_per_split": 3,
    "score": "rank2",
}
JUDGED = {"replays": "new/judged", "subsets": 3, "examples": 4, "shares": 0.3, "random_vectors": 1}
OF_COMMANDS: dict[Words, dict[str, Any]] = {
    ("generate-benchmark",): {"config": "benchmark.json", "overrides": "output_dir=new"},
    ("import-recording",): {"folder": "mine", "module": "mine.py:build", "overwrite": True},
    ("trace", "arrays"): {"folder": "runs/tiny/analysis/attributed", "output": "new.nc"},
    ("trace", "counterfactual"): {"edits_file": "edits.jsonl"},
    ("study", "data-attribution"): JUDGED,
    ("series", "scan"): {"series": "series", "length": 8, "strings": 2},
}
"""What these take in place of it; some of it stands in the wide world alone."""
PLACES = {"runs/tiny": "", "new": "new/", "trace": "t", "mine": "m", "series": "s"}
"""What stands before the name."""
PLACE = re.compile(r"^(?:trace|mine|series)$|runs/tiny|new")
PARTS = [" ", "'", '"', "$(touch executed)", "`touch executed`", ";touch executed;", "\n", "\t"]
PARTS += ["|", "<script>executed</script>", "</script>", "-x", "=1+1", "@", "&amp;", "\u00e9", "*"]
PARTS += ["\u65e5\u672c", "?", "\\", "#", "!", "~", "$HOME", "{{7}}", "%s", "[red]", ",", "[a](b)"]
PARTS += ["\u202e", "\r", "\x1b[31m", "\x07", "--", "n" * 150]
STUB = '#!/bin/sh\nprintf "%s\\0" "$@" >> "$SAID"; printf "\\1\\0" >> "$SAID"\n'
"""A `circuit` that writes down its words."""


def names(count: int) -> list[str]:
    """All parts in one, each alone, then several together; no folder's name has a slash."""
    rng = random.Random(0)
    drawn = ["".join(rng.sample(PARTS, rng.randint(2, 4))) for _ in range(count)]
    whole = [name.replace("/", "") for name in ["".join(PARTS[:-1]), *PARTS, *drawn]]
    return [name for name in whole if name.strip()][:count]


class Skeleton(HTMLParser):
    """Tags of a page with the names of their attributes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.feed(Path(page).read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, [name for name, _ in attributes]))


def pasted(text: str) -> list[list[str]]:
    """What the commands of a text are called with, pasted into a shell."""
    commands = text[text.index("  circuit ") : text.rindex("\nwrote ")]
    Path("bin").mkdir()
    Path("bin/circuit").write_text(STUB)
    Path("bin/circuit").chmod(0o755)
    Path("said").write_bytes(b"")
    where = {"PATH": f"{Path('bin').resolve()}:{os.environ['PATH']}", "SAID": "said"}
    subprocess.run(["bash", "-c", commands], env=where, check=False, stdin=subprocess.DEVNULL)
    lines = Path("said").read_bytes().decode("utf-8", "replace").split("\1\0")[:-1]
    return [[part for word in line.split("\0")[:-1] for part in _parts(word)] for line in lines]


def _parts(word: str) -> list[str]:
    """A word, or the two of `--option=value`, as a value that begins with a dash is given."""
    option, sign, value = word.partition("=")
    joined = sign and re.fullmatch(r"--[a-z-]+", option)
    return [option, value] if joined else [word.removeprefix("./")]


def shapes(*folders: str) -> dict[str, list[int]]:
    """Cells of every line of the tables, in Markdown and CSV, in some folders."""
    made = {}
    for path in (path for folder in folders for path in Path(folder).rglob("*.*")):
        if path.suffix == ".md":
            lines = [line for line in path.read_text().split("\n") if line.startswith("|")]
            made[path.name] = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
        elif path.suffix == ".csv":
            with path.open(newline="") as file:
                made[path.name] = [len(row) for row in csv.reader(file)]
    return made


def named(name: str) -> None:
    """Give the run that name as its folder and its label, and so the rest; edits as their label."""
    for place in ("runs/tiny", "trace", "mine", "series"):
        if Path(place).exists():
            Path(place).rename(PLACES[place] + name)
    if Path("edits.jsonl").exists():
        Path("edits.jsonl").unlink()
        edit = {"start": 0, "end": 2, "terms": {"weight_decay": 0.0}}
        Path("edits.jsonl").write_text(json.dumps({"label": name, "edit": edit}))
    config = Path(name, "run_config.json")
    text = json.dumps(json.loads(config.read_text()) | {"name": name})
    config.unlink()
    config.write_text(text)


def every(name: str) -> list[Words]:
    """Every command with what it needs, of a run and a trace of that name, into such a folder."""
    lines = []
    for words, command in leaves(typer.main.get_command(program())):
        options, arguments = list(words), ["--"]
        for parameter in command.params:
            good = GIVEN.get(parameter.name, "new" if parameter.required else ())
            good = OF_COMMANDS.get(words, {}).get(parameter.name, good)
            for value in good if isinstance(good, tuple) else (good,):
                text = PLACE.sub(lambda at: PLACES[at[0]] + name, str(value))
                is_option = parameter.param_type_name == "option"
                flag = getattr(parameter, "is_flag", False)
                options += [parameter.opts[0] + ("" if flag else f"={text}")] if is_option else []
                arguments += [] if is_option else [text]
        lines.append((*options, *(arguments if arguments[1:] else ())))
    return lines


def outcome(name: str, line: int, place: Path, world: Path) -> tuple[int, Any]:
    """How one of these commands ends, and the shapes of its tables; or how it broke the law."""
    renewed(world, place)
    named(name)
    done = typed(every(name)[line])
    if done.breach or any(Path().rglob("executed")):
        return 99, f"{done.breach} {list(Path().rglob('executed'))}"
    return done.code, shapes("new")


def told(name: str) -> tuple[dict[str, Any], list[str]]:
    """What commands make of a run of that name and label, and what they broke of the law."""
    named(name)
    page = ["page", "--output", "page.html"]
    done = [typed([*page, "--", name])]
    commands = pasted(done[0].out) if done[0].code == 0 else []
    done += [typed(words) for words in commands if words[0] == "weight-svd-trace"]
    done.append(typed(["study", "compare-optimizers", f"--run={name}", "--output-dir", "out"]))
    done.append(typed([*page, "--overwrite", "--", name]))
    done.append(typed(["page", "--compare", "--output", "c.html", "--", name, "runs/half"]))
    broken = [one.breach or one.err for one in done if one.code or one.breach]
    if broken:
        return {}, broken
    pages = {path: Skeleton(path).tags for path in ("page.html", "c.html")}
    return {"pasted": commands, **pages, **shapes("out", name)}, [
        str(p) for p in Path().rglob("executed")
    ]


SLICES = in_parts((slice(part, 100, 5),) for part in range(5))
LONG_SLICES = [pytest.param(*one.values, marks=WHOLE) for one in SLICES]
"""Of a hundred names; a slice takes a minute, or through every command four."""


@pytest.mark.parametrize("part", [slice(0, 1), *SLICES], ids=str)
def test_a_name_is_a_name_wherever_it_is_printed(part: slice, place: Path, world: Path) -> None:
    renewed(world, place)
    expected, broken = told(PLAIN)
    assert broken == []
    wrong = []
    for name in names(100)[part]:
        renewed(world, place)
        said, broken = told(name)
        meant = [[word.replace(PLAIN, name) for word in line] for line in expected["pasted"]]
        differing = [key for key in said if said[key] != (expected | {"pasted": meant})[key]]
        if broken or differing:
            wrong.append(f"{name!r}: {broken} {differing} {str(said.get('pasted'))[:200]}")
    count = len(names(100)[part])
    print(f"names: {count}; pasted, drawn or tabled wrong, or executed: {len(wrong)}")
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize("part", [slice(0, 1), *LONG_SLICES], ids=str)
def test_a_name_changes_nothing_of_what_a_command_does(
    part: slice, place: Path, world: Path
) -> None:
    step = 30 if part == slice(0, 1) else 9
    renewed(world, place)
    total, wrong, codes = len(every(PLAIN)), [], Counter[int]()
    plain: dict[int, tuple[int, Any]] = {}
    chosen = list(enumerate(names(100)))[part]
    for number, name in chosen:
        for line in range(number % step, total, step):
            if line not in plain:
                plain[line] = outcome(PLAIN, line, place, world)
            ended = outcome(name, line, place, world)
            codes[ended[0]] += 1
            if ended != plain[line] or ended[0] == 99:
                wrong.append(f"{name!r}: {every(name)[line]} {ended} {plain[line]}")
    print(
        f"names: {len(chosen)} through {len(plain)} of {total} commands, {codes[0]} done,"
        f" {codes[2]} refused; otherwise than with a plain name: {len(wrong)}"
    )
    assert wrong == [], "\n".join(wrong[:20])
