"""Completion as a user meets it: keys typed into real shells on a terminal, and what stands there.

bash is driven in every run; zsh and fish, and the long list of lines, in `make test-system`.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer.main
from circuit.cli.app import app
from command_line import type_in
from warm import warm_program

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
HANGS = 600
"""Seconds of silence after which a shell is given up; no law rests on it."""
SPAWN = "import pty, sys; pty.spawn(sys.argv[1:])"
BARE = {
    "bash": ["bash", "--norc", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
OF_USER = {shell: [shell, "-i"] for shell in BARE}
SOURCE = {
    "bash": 'eval "$(_CIRCUIT_COMPLETE=source_bash circuit)"',
    "zsh": 'eval "$(_CIRCUIT_COMPLETE=source_zsh circuit)"',
    "fish": "env _CIRCUIT_COMPLETE=source_fish circuit | source",
}
# Ctrl-G prints the line as it stands, between << and >>, and empties it (no key does that while the
# shell is busy: the terminal would take it for its own); bash lists candidates at the first tab
KEYS = {
    "bash": [
        r"""bind -x '"\C-g": printf "\x3c\x3c%s\x3e\x3e" "$READLINE_LINE"; READLINE_LINE='""",
        "bind 'set show-all-if-ambiguous on'; bind 'set page-completions off'",
        "bind 'set completion-query-items 0'; bind 'set bell-style none'",
    ],
    "zsh": [
        r"show() { print -rn -- $'\x3c\x3c'$BUFFER$'\x3e\x3e'; BUFFER= }",
        "zle -N show; bindkey '^G' show",
        "LISTMAX=0; unsetopt beep",
    ],
    "fish": [r"""bind \cg 'printf "\x3c\x3c%s\x3e\x3e" (commandline); commandline ""'"""],
}


class Terminal:
    """A shell on a terminal; keys go in, and what it shows comes out."""

    def __init__(
        self, shell: str, words: list[str], folder: Path, home: Path, programs: str
    ) -> None:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("_CIRCUIT", "ZDOT", "XDG"))}
        self.shell = shell
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", SPAWN, *words],
            cwd=folder,
            env=own | {"PATH": f"{programs}:{own['PATH']}", "HOME": str(home), "TERM": "xterm"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.run("stty cols 200 rows 60", *KEYS[shell])

    def type(self, keys: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(keys.encode())
        self.process.stdin.flush()

    def read(self, pattern: str) -> str:
        """What is shown up to the end of the pattern."""
        assert self.process.stdout is not None
        while not (found := re.search(pattern, self.shown, flags=re.DOTALL)):
            ready = select.select([self.process.stdout], [], [], HANGS)[0]
            data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert data, f"{self.shell} shows no {pattern!r} but {self.shown[-2000:]!r}"
            self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode(errors="replace"))
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text

    def run(self, *commands: str) -> str:
        """Runs lines, and gives what they show."""
        for command in commands:
            self.type(f"{command}\r")
        self.type("echo all do''ne\r")
        return self.read("all done")

    def tab(self, line: str) -> tuple[str, str]:
        """The line after the tab key, and what was shown meanwhile."""
        self.type(f"{line}\t\x07")
        shown = self.read("<<.*?>>")
        return shown[shown.rindex("<<") + 2 : -2], shown

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


Open = Callable[..., Terminal]


@pytest.fixture
def open_shell(tmp_path: Path) -> Iterator[Open]:
    """Opens shells in a project with one run, at a home without any settings of the user's."""
    run = tmp_path / "work/artifacts/runs/one"
    shutil.copytree(ROOT / "configs", tmp_path / "work/configs")
    (run / "checkpoints").mkdir(parents=True)
    (run / "analysis/trace").mkdir(parents=True)
    shutil.copy(ROOT / "configs/train/quickstart.json", run / "run_config.json")
    for name in ("checkpoints/best.pt", "analysis/trace/trace.json", "analysis/probe_set.jsonl"):
        (run / name).touch()
    (tmp_path / "work/README.md").touch()
    (tmp_path / "home").mkdir()
    opened: list[Terminal] = []

    def open_one(shell: str, words: list[str] | None = None, programs: Path = BIN) -> Terminal:
        if shutil.which(shell) is None:
            pytest.skip(f"{shell} is not installed")
        words = words or OF_USER[shell]
        work, home = tmp_path / "work", tmp_path / "home"
        opened.append(Terminal(shell, words, work, home, f"{programs}:{BIN}"))
        return opened[-1]

    yield open_one
    for terminal in opened:
        terminal.close()


TRAIN = "configs/train/quickstart.json"
FEW = {
    "circuit trace ve": "circuit trace verify ",
    "circuit train --config configs/train/q": f"circuit train --config {TRAIN} ",
    "circuit train --set optimizer.le": "circuit train --set optimizer.learning_rate=",
    "circuit train --set optimizer.name=ad": "circuit train --set optimizer.name=adamw ",
}
"""What is typed, and what stands there after the tab key."""
_MARGIN = "circuit route-to-margin-closure --route label=a,"
MANY = FEW | {
    "circuit generate-b": "circuit generate-benchmark ",
    "circuit train --con": "circuit train --config ",
    "circuit train --config=configs/train/q": f"circuit train --config={TRAIN} ",
    "circuit train --set=optimizer.name=ad": "circuit train --set=optimizer.name=adamw ",
    "circuit generate-benchmark --set num_k": "circuit generate-benchmark --set num_keys=",
    "circuit trace verify arti": "circuit trace verify artifacts/runs/one/analysis/trace ",
    "circuit trace qk --probe-set a": (
        "circuit trace qk --probe-set artifacts/runs/one/analysis/probe_set.jsonl "
    ),
    "circuit evaluate --checkpoint a": (
        "circuit evaluate --checkpoint artifacts/runs/one/checkpoints/best.pt "
    ),
    "circuit page a": "circuit page artifacts/runs/one ",
    "circuit evaluate --split held": "circuit evaluate --split heldout_pairs ",
    "circuit trace qk --context-stage fin": "circuit trace qk --context-stage final_norm ",
    "circuit trace qk --basis st": "circuit trace qk --basis step:",
    "circuit trace write --position-role q": "circuit trace write --position-role query_key ",
    "circuit trace write --scalar corr": "circuit trace write --scalar correct_value_logit ",
    "circuit trace write --pair-type rec": "circuit trace write --pair-type recency ",
    "circuit trace write --component L0": "circuit trace write --component L0MLP ",
    f"{_MARGIN}sta": f"{_MARGIN}stage=",
    f"{_MARGIN}stage=fin": f"{_MARGIN}stage=final_norm ",
    "circuit reproduce ref": "circuit reproduce reference ",
    "circuit reproduce paper --scale sm": "circuit reproduce paper --scale smoke ",
    "circuit evaluate --output READ": "circuit evaluate --output README.md ",
    "circuit evaluate --output $PWD/READ": "circuit evaluate --output $PWD/README.md ",
    f"{BIN}/circuit trace ve": f"{BIN}/circuit trace verify ",
}
_OWN = f"--config {TRAIN}"
LISTED = {
    f"circuit trace qk {_OWN} --head L": {f"L{x}H{y}" for x in range(2) for y in range(4)},
    "circuit train --device ": {"cpu", "cuda", "mps"},
    f"circuit train {_OWN} --set optimizer.": {
        f"optimizer.{field}="
        for field in ("name", "learning_rate", "beta1", "beta2", "eps", "weight_decay")
    },
    "circuit trace ": {"record", "show", "verify", "checkout", "prune", "qk", "write", "merge"},
}
system = pytest.mark.system


def check(terminal: Terminal, lines: dict[str, str]) -> None:
    for line, expected in lines.items():
        assert terminal.tab(line)[0] == expected


def test_bash_completes(open_shell: Open) -> None:
    terminal = open_shell("bash", BARE["bash"])
    terminal.run(SOURCE["bash"])
    check(terminal, FEW)


@pytest.mark.parametrize("shell", BARE)
@system
def test_a_shell_completes_what_is_typed(open_shell: Open, shell: str) -> None:
    terminal = open_shell(shell, BARE[shell])
    if shell == "zsh":
        terminal.run("autoload -Uz compinit; compinit -u")
    terminal.run(SOURCE[shell])
    check(terminal, MANY)
    for line, names in LISTED.items():
        # the list that fish shows is cut to the width
        listed = shell == "fish"
        shown = terminal.run(f"complete -C '{line}'") if listed else terminal.tab(line)[1]
        assert names <= set(shown.split()), line


ODD = ("with space", "it's", "a$b", "f(x)", 'q"d', "k\\l", "m@n", "e=f:g", "c,d", "été")
"""Names of runs, each with its own first letter."""


def check_quotes(terminal: Terminal, tmp_path: Path) -> None:
    """What stands there after the tab key is the name, as this shell takes it."""
    for name in ODD:
        run = tmp_path / "work/artifacts/runs" / name
        run.mkdir()
        shutil.copy(ROOT / "configs/train/quickstart.json", run / "run_config.json")
    for name in ODD:
        path = f"artifacts/runs/{name}"
        for quote in ("", '"', "'"):
            line = terminal.tab(f"circuit page {quote}artifacts/runs/{name[0]}")[0]
            assert printed(terminal, line.removeprefix("circuit page ")) == path, line
    line = terminal.tab("circuit train --config=artifacts/runs/f\\(x\\)/r")[0]
    assert printed(terminal, line.split()[-1]) == "--config=artifacts/runs/f(x)/run_config.json"
    # what is known of it: its model has two layers
    for word in ("artifacts/runs/with\\ space", "'artifacts/runs/with space'"):
        line = f"circuit trace write --config {word} --component L1M"
        assert terminal.tab(line)[0] == f"{line}LP "
    line = "circuit page artifacts/runs/with\\ "
    if terminal.shell == "bash":  # others offer files there
        assert terminal.tab(line)[0] == f"{line}space "


def printed(terminal: Terminal, word: str) -> str:
    """A word as the shell hands it to a program."""
    shown = terminal.run(f"printf '\\x7b%s\\x7d\\n' {word}")
    return shown[shown.rindex("{") + 1 : shown.rindex("}")]


def test_bash_quotes_names(open_shell: Open, tmp_path: Path) -> None:
    """What the shell does with an answer; whose answers are forks, for there are many."""
    typer.main.get_command(app)  # which is kept, and put together before there are forks
    with warm_program(tmp_path / "bin" / "circuit", type_in):
        terminal = open_shell("bash", BARE["bash"], tmp_path / "bin")
        terminal.run(SOURCE["bash"])
        check_quotes(terminal, tmp_path)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
@system
def test_a_shell_quotes_names(open_shell: Open, tmp_path: Path, shell: str) -> None:
    terminal = open_shell(shell, BARE[shell])
    if shell == "zsh":
        terminal.run("autoload -Uz compinit; compinit -u")
    terminal.run(SOURCE[shell])
    check_quotes(terminal, tmp_path)


def installs(open_shell: Open, home: Path, shell: str, typed_into: str, command: str) -> None:
    """What is installed works in the next shell, and installing it again changes nothing."""
    (home / ".zshrc").touch()  # else zsh asks a new user what to write there
    before = open_shell(typed_into)
    assert f"{shell} completion installed in {home}" in before.run(command)
    written = [path for path in home.rglob("*circuit*") if path.is_file()]
    assert written
    files = {path: path.read_bytes() for path in [*written, *home.glob(".*shrc")]}
    assert "installed" in before.run(command)
    assert {path: path.read_bytes() for path in files} == files
    after = open_shell(shell)
    assert after.tab("circuit trace ve")[0] == "circuit trace verify "
    assert after.tab("circuit train --set optimizer.le")[0].endswith(".learning_rate=")


def test_bash_has_it_in_the_next_shell(open_shell: Open, tmp_path: Path) -> None:
    installs(open_shell, tmp_path / "home", "bash", "bash", "circuit --install-completion bash")


@pytest.mark.parametrize("shell", BARE)
@system
def test_the_shell_that_is_typed_into_is_found(
    open_shell: Open, tmp_path: Path, shell: str
) -> None:
    installs(open_shell, tmp_path / "home", shell, shell, "circuit --install-completion")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
@system
def test_another_shell_can_be_named(open_shell: Open, tmp_path: Path, shell: str) -> None:
    command = f"circuit --install-completion {shell}"
    installs(open_shell, tmp_path / "home", shell, "bash", command)
