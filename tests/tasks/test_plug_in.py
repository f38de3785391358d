"""A task of one's own, `file.py:Class`, works like ours, and what is wrong with it is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from circuit.errors import CircuitError
from circuit.tasks.base import Task
from circuit.tasks.benchmark import load_benchmark, write_benchmark
from circuit.tasks.pairs import build_pairs
from circuit.tasks.probes import read_probe_set, write_probe_set
from circuit.tasks.registry import find_task, load_benchmark_config

OWN = '''
from typing import Annotated

from pydantic import Field

from circuit.tasks.base import Drawn, Parsed, Question, Record, Task, TaskConfig, Vocabulary


class Config(TaskConfig):
    samples: Annotated[int, Field(ge=1)]


class Echo(Task):
    """`> a` is answered `a`."""

    Config = Config
    kinds = ("arrow", "letter")
    roles = {"prediction": "at", "letter": "letter_pos"}
    facts = {"letter_pos": False}
    support = "letter"

    def __init__(self, config, facts=None):
        super().__init__(config)
        self.vocabulary = Vocabulary(["<pad>", ">", "a", "b", "c"])
        self.choices = range(2, 5)
        self.token_sets = {}
        self.split_names = ("train",)

    def draw(self, report):
        made = []
        for i in range(self.config.samples):
            letter = 2 + (i + self.config.seed) % 3
            made.append(Record(f"train-{i}", "train", (letter, 1, letter)))
            report("train", i + 1)
        return Drawn({"train": made})

    def parse(self, record, through=None):
        return Parsed([Question(0, 1, record.tokens[0], {"letter_pos": 0})], [1, 0, 1])
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a task of one's own, `mine.py:Echo`, and a config of it."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN)
    config = {"name": "echo", "benchmark_type": "mine.py:Echo", "output_dir": "data/echo"}
    Path("echo.json").write_text(json.dumps({**config, "seed": 3, "samples": 4}))
    return tmp_path


def own_config(place: str) -> None:
    payload = json.loads(Path("echo.json").read_text())
    Path("echo.json").write_text(json.dumps({**payload, "benchmark_type": place}))


@pytest.mark.usefixtures("own")
def test_a_task_of_ones_own_is_drawn_written_and_read_back() -> None:
    config = load_benchmark_config("echo.json", ["samples=7"])
    seen: list[tuple[str, int]] = []
    made, _ = write_benchmark(config, progress=lambda split, done: seen.append((split, done)))
    assert seen[-1] == ("train", 7)
    assert made.task.tell(made.figures).rows == [["train", "7", "7", "3-3"]]
    loaded = load_benchmark("data/echo")
    assert loaded == made
    batch = loaded.task.examples(loaded.records("train"))
    assert batch.answer.tolist() == batch.tokens[:, 0].tolist()
    assert list(batch.by_slice()) == ["all"]
    assert batch.position("letter").tolist() == [0] * 7
    write_probe_set("data/echo", "probes.jsonl", ["train"], 3)
    assert len(read_probe_set("probes.jsonl", loaded).records) == 3
    with pytest.raises(CircuitError, match="unknown pair type 'x'; expected no pair type"):
        build_pairs(loaded.task, loaded.records("train"), types=["x"], max_per_type=1)
    with pytest.raises(CircuitError, match="samples"):
        load_benchmark_config("echo.json", ["samples=0"])
    assert find_task("mine.py:Echo") is find_task("mine.py:Echo")


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("place", "source", "said"),
    [
        ("nowhere.py:Echo", None, "nowhere.py: the task's file cannot be read"),
        ("mine.py:Ecko", None, "mine.py: 'Ecko' is no task; expected a class of circuit.tasks"),
        ("mine.py:OWN", "OWN = 3", "mine.py: 'OWN' is no task"),
        ("mine.py:Config", None, "mine.py: 'Config' is no task"),
        ("mine.py:Echo", "1 / 0", "mine.py: .*cannot be imported .ZeroDivisionError: division"),
        ("mine.py:Echo", "raise SystemExit(3)", "mine.py: .*cannot be imported .SystemExit: 3"),
        ("mine.py:Echo", "raise GeneratorExit", "mine.py: .*cannot be imported .GeneratorExit"),
        (
            "mine.py:Echo",
            "class Odd(Exception):\n    def __str__(self): 1 / 0\nraise Odd",
            "mine.py: .*cannot be imported .Odd: which has no text",
        ),
        ("mine.py:Echo", "class Echo(", "mine.py: .*cannot be imported .SyntaxError"),
        ("mine.py:Echo", "import no_such_module", "cannot be imported .ModuleNotFoundError"),
        ("mine.txt:Echo", "text", "mine.txt: .*cannot be imported .ImportError: it is no Python"),
        (
            "mine.py:Task",
            "from circuit.tasks.base import Task",
            "does not define draw, parse",
        ),
        (":Echo", None, "is a folder; expected a file"),
        ("echo", None, "field 'benchmark_type': unknown task 'echo'; expected one of symbolic_kv"),
    ],
)
def test_what_is_no_task_of_ones_own_is_one_line(place: str, source: str | None, said: str) -> None:
    if source is not None:
        Path(place.partition(":")[0]).write_text(source)
    own_config(place)
    for call in (
        lambda: find_task(place),
        lambda: load_benchmark_config("echo.json"),
    ):
        with pytest.raises(CircuitError) as refused:
            call()
        assert re.search(said, str(refused.value)), str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("own")
def test_an_edited_file_is_imported_anew_and_a_benchmark_of_another_task_is_refused() -> None:
    write_benchmark(load_benchmark_config("echo.json"))
    before: type[Task] = find_task("mine.py:Echo")
    Path("mine.py").write_text(OWN.replace('"letter": "letter_pos"}', "}"))
    assert "letter" in before.roles
    assert "letter" not in find_task("mine.py:Echo").roles
    payload = json.loads(Path("data/echo/metadata.json").read_text())
    payload["config"]["benchmark_type"] = "symbolic_kv_stream"
    Path("data/echo/metadata.json").write_text(json.dumps(payload))
    with pytest.raises(CircuitError, match="not the one that the benchmark was drawn with"):
        load_benchmark("data/echo")


def test_a_config_without_a_task_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.json"
    for text, said in (
        ('{"name": "x", "output_dir": "o", "seed": 1}', "benchmark_type"),
        ("[]", "config.json"),
        ('{"benchmark_type": 3, "name": "x", "output_dir": "o", "seed": 1}', "benchmark_type"),
    ):
        path.write_text(text)
        with pytest.raises(CircuitError, match=said):
            load_benchmark_config(path)
