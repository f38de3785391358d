"""A wider world, for the long runs: recordings, recipes, counterfactual runs, queues, scores.

Its commands are lines of `circuit`, or `watch ...`: a loop of somebody's own that is recorded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from sums_module import sums_module
from torch import nn

import circuit
from circuit.attribution.scores import Scores, read_scores, write_scores

Words = tuple[str, ...]

MINE = (
    sums_module(3, 4, 6)
    + """

class Sums(circuit.Recipe):
    steps, checkpoint_every, log_every = 6, 3, 1

    def module(self):
        return build()

    def batch(self, step):
        rows = torch.randint(len(pairs), (4,))
        return circuit.Batch(pairs[rows], sums[rows], rows)

    def losses(self, outputs, batch):
        each = nn.functional.cross_entropy(outputs, batch.targets, reduction="none")
        return each / batch.size

    def optimizer(self, module):
        return torch.optim.AdamW(module.parameters(), lr=0.01, foreach=False)
"""
)
"""A module, a number of it, a recipe and a task, as somebody writes them."""


def watch(words: Sequence[str]) -> None:
    """A loop of somebody's own, recorded: `FOLDER STEPS`, with `--overwrite`, `--resume`, `--stop`.

    It saves its state after step 5, goes on from there to resume, and is cut off to stop.
    """
    folder, until, *given = words
    torch.manual_seed(0)
    hidden = [nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)]
    model = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), *hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, foreach=False)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    first, saved = 0, Path(f"{folder}.pt")
    if "--resume" in given and saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    def norm(module: nn.Module) -> torch.Tensor:
        return next(module.parameters()).square().sum()

    switches = {name: f"--{name}" in given for name in ("overwrite", "resume")}
    watched = circuit.watch(
        model, optimizer, folder, anchor_every=4, scalars=[norm], attribute=False, **switches
    )
    with watched:
        for step in range(first + 1, int(until) + 1):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pairs), pairs.sum(1) % 3).backward()
            optimizer.step()
            if step == 5 and not saved.exists():
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "step": step}, saved)
        if "--stop" in given:
            raise KeyboardInterrupt


RUN, TRACE = ("--config", "runs/tiny"), ("--optimizer-trace-dir", "trace")
PROBES = ("--probe-set", "runs/tiny/analysis/probe_set.jsonl")
OF_RUN = (*RUN, *PROBES, *TRACE, "--scalar", "loss", "--end-step", "2")
OUT = ("--output-dir", "out")
WATCH, WATCH_CUT = ("watch", "mine", "8"), ("watch", "cut", "7", "--stop")
WATCH_ON = ("watch", "cut", "8", "--resume")
RECIPE = ("--recipe", "mine.py:Sums")
OWN = "own/analysis/optimizer_update_trace"
IMPORT = ("import-recording", "mine", "--module", "mine.py:build", "--task", "mine.py:Pairs")
OTHERWISE = ("trace", "counterfactual", *OF_RUN, "--edits", "edits.jsonl")
LEFT = (*OTHERWISE, "--runs-dir", "left")
ONE_STEP = ("trace", "counterfactual", *OF_RUN[:-1], "1", "--edit", "less,scale=weight_decay*0")
QUEUED = (*OTHERWISE, "--replays", "queue")
CREDIT, INFLUENCE = ("trace", "data", *OF_RUN), ("trace", "influence", *OF_RUN)
ATTRIBUTE = ("trace", "attribute", *OF_RUN)
JUDGE = ("study", "data-attribution", *OF_RUN, "--window", "0:2", "--examples", "4")
JUDGE += ("--subsets", "3", "--share", "0.3", "--random-vectors", "1", "--replays", "judged")
SCORED = (*JUDGE, "--scores", "theirs.npz")
TRAIN_OWN = ("train", *RECIPE, "--output-dir", "own", "--seed", "3", "--trace")
TRAIN_OWN += ("--stop-at-step", "4", "--trace-anchor-every", "2")
SCAN = ("series", "scan", "--series", "series", "--length", "8", "--strings", "2")
MINE_PROBES = "mine/analysis/probe_set.jsonl"
DRAW_MINE = ("generate-probe-set", "--benchmark-dir", "mine/benchmark", "--split", "all")
DRAW_MINE += ("--examples-per-split", "9", "--output", MINE_PROBES)
OF_MINE = ("trace", "attribute", "--config", "mine", "--optimizer-trace-dir", "mine")
OF_MINE += ("--scalar", "mine.py:loss", "--probe-set", MINE_PROBES, "--end-step", "3")
ANALYSIS = "runs/tiny/analysis"


SHOW, CHECKOUT = ("trace", "show"), ("trace", "checkout")
VERIFY = ("trace", "verify")
AT_6 = ("--step", "6", "--output", "out.pt")
PAGE, OWN_PAGE = ("page", "runs/tiny", "--overwrite"), ("page", "own", "--output", "out.html")
EVALUATE_MINE = ("evaluate", "--config", "mine", "--checkpoint", "mine/checkpoints/step_000004.pt")
OWN_ON = ("train", *RECIPE, "--config", "own", "--resume")
OWN_VERIFY = (*VERIFY, OWN, *RECIPE)
OWN_NORM = ("trace", "attribute", "--config", "own", *RECIPE, "--optimizer-trace-dir", OWN)
OWN_NORM += ("--scalar", "mine.py:loss", "--end-step", "3", *OUT)
AGAIN = ("--overwrite", *OUT)
LEFT_PAGE = ("page", "left/less", "--output", "out.html")
LEFT_TRACE = "left/less/analysis/optimizer_update_trace"
ARRAYS = ("trace", "arrays", f"{ANALYSIS}/attributed", "--output", "out/a.nc")
IMPORT_AGAIN = (*IMPORT, "--overwrite")
READ: dict[str, list[Words]] = {
    "mine/recording.json": [(*SHOW, "mine"), (*VERIFY, "mine"), IMPORT_AGAIN, (*OF_MINE, *OUT)],
    "mine/ended.json": [(*SHOW, "mine"), ("watch", "mine", "8", "--resume")],
    "mine/steps/from_000000.journal": [
        (*VERIFY, "mine"),
        (*CHECKOUT, "mine", *AT_6),
        (*OF_MINE, *OUT),
        ("watch", "mine", "8", "--overwrite"),
    ],
    "mine/steps/from_000004.journal": [(*CHECKOUT, "mine", *AT_6), IMPORT_AGAIN],
    "mine/run_config.json": [(*OF_MINE, *OUT), EVALUATE_MINE],
    "mine/checkpoints/step_000004.pt": [EVALUATE_MINE],
    "mine/import-recording.manifest.json": [IMPORT_AGAIN],
    "mine/benchmark/metadata.json": [EVALUATE_MINE, (*DRAW_MINE[:-1], "out.jsonl")],
    "mine/benchmark/all.jsonl": [EVALUATE_MINE],
    f"{MINE_PROBES}": [(*OF_MINE, *OUT)],
    "mine/analysis/loss/scalar_attribution_rows.jsonl": [("page", "mine", "--output", "o.html")],
    "cut/recording.json": [WATCH_ON],
    "cut/steps/from_000000.journal": [WATCH_ON],
    "cut/steps/from_000004.journal": [WATCH_ON],
    "cut/watch_rows.jsonl": [WATCH_ON],
    "cut/watch.manifest.json": [WATCH_ON],
    "mine.py": [OWN_ON, OWN_VERIFY, OWN_NORM],
    "own/run_config.json": [OWN_ON, OWN_NORM],
    "own/environment.json": [OWN_ON],
    "own/metrics.jsonl": [OWN_ON, OWN_PAGE],
    "own/train.manifest.json": [OWN_ON],
    "own/checkpoints/step_000003.pt": [OWN_ON, OWN_PAGE],
    "own/checkpoints/step_000004.pt": [OWN_ON],
    f"{OWN}/trace.json": [OWN_VERIFY, OWN_NORM, OWN_PAGE],
    f"{OWN}/optimizer_update_trace_rows.jsonl": [OWN_VERIFY, OWN_NORM],
    f"{OWN}/recorded_while_training.json": [OWN_VERIFY, OWN_PAGE],
    f"{OWN}/checkpoints/step_000002.pt": [OWN_VERIFY, OWN_NORM],
    "edits.jsonl": [(*OTHERWISE, *OUT)],
    "queue/replays.jsonl": [(*QUEUED, *OUT)],
    "left/less/run_config.json": [(*LEFT, *OUT), LEFT_PAGE, (*VERIFY, LEFT_TRACE)],
    "left/less/environment.json": [(*LEFT, *OUT), LEFT_PAGE],
    "left/less/checkpoints/step_000000.pt": [(*LEFT, *OUT), LEFT_PAGE],
    "left/less/checkpoints/step_000002.pt": [(*LEFT, *OUT), LEFT_PAGE],
    "left/less/counterfactual-run.manifest.json": [(*LEFT, *OUT)],
    f"{LEFT_TRACE}/trace.json": [(*LEFT, *OUT), (*VERIFY, LEFT_TRACE)],
    f"{LEFT_TRACE}/optimizer_update_trace_rows.jsonl": [(*LEFT, *OUT), (*VERIFY, LEFT_TRACE)],
    f"{LEFT_TRACE}/checkpoints/step_000002.pt": [(*LEFT, *OUT), (*VERIFY, LEFT_TRACE)],
    f"{ANALYSIS}/credit/data_credit_report.json": [PAGE],
    f"{ANALYSIS}/credit/data_credit_rows.jsonl": [PAGE],
    f"{ANALYSIS}/credit/data_credit_steps.jsonl": [PAGE],
    f"{ANALYSIS}/credit/data_credit_examples.jsonl": [PAGE],
    f"{ANALYSIS}/credit/data-credit.manifest.json": [
        (*CREDIT, "--overwrite", "--output-dir", f"{ANALYSIS}/credit")
    ],
    f"{ANALYSIS}/influence/data_influence_report.json": [PAGE],
    f"{ANALYSIS}/influence/data_influence_rows.jsonl": [PAGE],
    f"{ANALYSIS}/otherwise/counterfactual_training_report.json": [PAGE],
    f"{ANALYSIS}/otherwise/counterfactual_training_rows.jsonl": [PAGE],
    f"{ANALYSIS}/attributed/scalar_attribution_report.json": [ARRAYS, PAGE],
    f"{ANALYSIS}/attributed/scalar_attribution_rows.jsonl": [ARRAYS, PAGE],
    f"{ANALYSIS}/judged/data_attribution_report.json": [PAGE],
    f"{ANALYSIS}/judged/data_attribution_trainings.jsonl": [PAGE],
    "judged/0_2/replays.jsonl": [(*JUDGE, *OUT)],
    "judged/0_2/credit.npz": [(*JUDGE, *OUT)],
    "judged/0_2/costs.json": [(*JUDGE, *OUT)],
    "theirs.npz": [(*SCORED, *OUT)],
    "series/step1/config.json": [(*SCAN, *OUT)],
    "series/step2/model.safetensors": [(*SCAN, *OUT)],
}
"""Commands of every kind of file."""
WRITTEN: dict[str, tuple[Words, Words, Words]] = {
    "watch": (("watch", "out", "8"), ("--overwrite",), ()),
    "watch over": (("watch", "out", "8", "--overwrite"), (), ("watch", "out", "6")),
    "watch on": (("watch", "out", "8", "--resume"), (), ("watch", "out", "7", "--stop")),
    "import-recording": (("import-recording", "cut", *IMPORT[2:4]), ("--overwrite",), ()),
    "train --recipe": ((*TRAIN_OWN[:3], *OUT, *TRAIN_OWN[5:]), ("--resume",), ()),
    "counterfactual --runs-dir": (
        (*ONE_STEP, "--runs-dir", "out/left", "--output-dir", "out/report"),
        ("--overwrite",),
        (),
    ),
    "counterfactual --replays": (
        (*QUEUED[:-1], "out/queue", "--output-dir", "out/report"),
        ("--overwrite",),
        (),
    ),
    "data": ((*CREDIT, *OUT), ("--overwrite",), ()),
    "influence": ((*INFLUENCE, *OUT), ("--overwrite",), ()),
    "data-attribution": (
        (*JUDGE[:-1], "out/judged", "--method", "credit", "--method", "random", *OUT),
        ("--overwrite",),
        (),
    ),
    "arrays": ((*ARRAYS,), ("--overwrite",), ()),
    "series scan": ((*SCAN, *OUT), ("--overwrite",), ()),
}
"""Commands that write; what is added where they were cut off; one that has written before."""


def widen() -> None:
    """Makes it, in a folder that holds the tiny run, its trace and its probe set."""
    from law import typed
    from transformers import GPT2Config, GPT2LMHeadModel

    Path("mine.py").write_text(MINE)
    edits = {
        "less": {"start": 0, "end": 2, "terms": {"weight_decay": 0.0}},
        "slow": {"start": 1, "end": 2, "settings": {"rate": 0.5}},
    }
    lines = [json.dumps({"label": label, "edit": edit}) + "\n" for label, edit in edits.items()]
    Path("edits.jsonl").write_text("".join(lines))
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 20}
    for step in (1, 2):
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
        model.save_pretrained(f"series/step{step}")
    for words in (
        WATCH,
        WATCH_CUT,
        IMPORT,
        TRAIN_OWN,
        (*LEFT, "--output-dir", f"{ANALYSIS}/otherwise"),
        (*QUEUED, "--output-dir", "queued"),
        (*CREDIT, "--output-dir", f"{ANALYSIS}/credit"),
        (*INFLUENCE, "--output-dir", f"{ANALYSIS}/influence"),
        (*ATTRIBUTE, "--output-dir", f"{ANALYSIS}/attributed"),
        (*JUDGE, "--output-dir", f"{ANALYSIS}/judged"),
        DRAW_MINE,
        (*OF_MINE, "--output-dir", "mine/analysis/loss"),
    ):
        done = typed(words)
        assert done.code == (130 if words == WATCH_CUT else 0), (words, done)
    ours = read_scores("judged/0_2/credit.npz")
    theirs = Scores("theirs", ours.scalars, ours.examples, ours.window, ours.scores + 1)
    write_scores("theirs.npz", theirs)
