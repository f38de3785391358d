"""Does the previous-token head decide when induction forms? The same runs with it held.

    python benchmarks/induction_clamp.py FOLDER [SEEDS]    # 5 seeds, about 20 s a condition

Each seed of `configs/train/induction.json` is trained free, and again with heads of layer 0 held
during every step from the first on. *previous* is the head of layer 0 with the most previous-token
attention at the end of the free run, *other* the other one. What is predicted was written down
before the runs, and stands in `CONDITIONS`. The loss of the answers is that of the model as it is
trained, with the clamp. A row a condition: the step at which that loss passes the middle between
its ends in the free run of the seed, minus that step of the free run; means over seeds with 95 %
bootstrap intervals; a run that never passes it counts as its last step ("at least").
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from over_seeds import interval
from torch import Tensor

from circuit.environment import prepare_process
from circuit.quickstart import quickstart_configs
from circuit.scalars.base import Cache, forward_activations
from circuit.scalars.induction import previous_token_attention
from circuit.tasks.benchmark import write_benchmark
from circuit.train_config import TrainConfig
from circuit.training.recipe import Batch, TaskRecipe
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup

EVERY = 10


class Clamp(NamedTuple):
    """What a head of layer 0 is held to."""

    point: str
    hold: Callable[[Tensor, int], Tensor]
    """From the point's activation and the head to the activation."""


def zero(output: Tensor, head: int) -> Tensor:
    """The head writes nothing: `[batch, pos, head, d_head]`."""
    return output * (torch.arange(output.shape[2]) != head)[:, None]


def look_back(pattern: Tensor, head: int) -> Tensor:
    """The head looks one token back (the first at itself): `[batch, head, query, key]`."""
    width = pattern.shape[-1]
    shifted = torch.eye(width).roll(-1, dims=1).tril()
    shifted[0, 0] = 1
    held = pattern.clone()
    held[:, head] = shifted
    return held


ABLATED, BACK = Clamp("blocks.0.attn.hook_z", zero), Clamp("blocks.0.attn.hook_pattern", look_back)
CONDITIONS: dict[str, tuple[Clamp | None, tuple[str, ...], str]] = {
    "free": (None, (), "-"),
    "previous ablated": (ABLATED, ("previous",), "later: the other head has to take the part"),
    "other ablated": (ABLATED, ("other",), "later, by less than with the previous-token head"),
    "both ablated": (ABLATED, ("previous", "other"), "never: nothing tells what came before"),
    "previous looks back": (BACK, ("previous",), "sooner: its pattern need not form"),
    "other looks back": (BACK, ("other",), "sooner"),
}


class ClampedRecipe(TaskRecipe):
    """The task's recipe with heads held in every forward pass."""

    def __init__(self, setup: Setup, clamp: Clamp | None, heads: tuple[int, ...]) -> None:
        super().__init__(setup)
        self.hooks = [
            (clamp.point, partial(_held, clamp=clamp, head=head)) for head in heads if clamp
        ]

    def outputs(self, module: Any, batch: Batch) -> Tensor:
        """Logits, as `TaskRecipe.outputs`."""
        logits: Tensor = module.run_with_hooks(batch.inputs[:, :-1], fwd_hooks=self.hooks)
        return logits


def _held(activation: Tensor, hook: Any, *, clamp: Clamp, head: int) -> Tensor:
    return clamp.hold(activation, head)


def main(folder: Path, seeds: int) -> None:
    """Print the table as Markdown."""
    benchmark, config = quickstart_configs("induction")
    data = folder / "data"
    write_benchmark(benchmark.model_copy(update={"output_dir": str(data)}), overwrite=True)
    shifts: dict[str, list[int]] = {name: [] for name in CONDITIONS}
    never = dict.fromkeys(CONDITIONS, 0)
    ends: dict[str, list[float]] = {name: [] for name in CONDITIONS}
    for seed in range(1, seeds + 1):
        chosen = config.replace(seed=seed, benchmark_dir=str(data))
        free, model = course(chosen, None, ())
        previous = looks_back(chosen, model)
        part = {"previous": previous, "other": 1 - previous}
        middle = (free[0] + free[max(free)]) / 2
        base = first_below(free, middle)
        assert base is not None
        for name, (clamp, heads, _) in CONDITIONS.items():
            losses = free
            if clamp is not None:
                losses, _ = course(chosen, clamp, tuple(part[head] for head in heads))
            at = first_below(losses, middle)
            never[name] += at is None
            shifts[name].append((chosen.steps if at is None else at) - base)
            ends[name].append(losses[max(losses)])
        print(f"seed {seed}: L0H{previous} looks back; free at step {base}", file=sys.stderr)
    print("| layer 0 | predicted | steps later than free | never | loss of the answers |")
    print("|---|---|---|---:|---|")
    for name, (_, _, predicted) in CONDITIONS.items():
        later = ("at least " if never[name] else "") + interval(shifts[name], ".0f")
        cells = [name, predicted, later, f"{never[name]} of {seeds}", interval(ends[name], ".2f")]
        print(f"| {' | '.join(cells)} |")


def course(
    config: TrainConfig, clamp: Clamp | None, heads: tuple[int, ...]
) -> tuple[dict[int, float], Any]:
    """Loss of the validation answers every `EVERY` steps, and the model at the end."""
    prepare_process(threads=config.threads)
    setup = Setup(config)
    recipe = ClampedRecipe(setup, clamp, heads)
    session = TrainingSession(setup, recipe=recipe)
    examples = setup.split("validation").batch()
    batch = Batch(examples.tokens, examples.targets(), np.arange(len(examples.tokens)))
    losses: dict[int, float] = {}
    while True:
        if session.step % EVERY == 0:
            with torch.no_grad():
                logits = recipe.outputs(session.model, batch)
            logs = logits[examples.row, examples.at].double().log_softmax(-1)
            losses[session.step] = float(-logs.gather(1, examples.answer[:, None]).mean())
        if session.step == config.steps:
            return losses, session.model
        session.advance()


def looks_back(config: TrainConfig, model: Any) -> int:
    """The head of layer 0 with the most attention to the token before."""
    batch = Setup(config).split("validation").batch()
    heads = [previous_token_attention(f"L0H{head}", batch) for head in range(2)]
    with torch.no_grad():
        found = forward_activations(model, batch.tokens, frozenset({heads[0].hook}))
    cache = Cache({None: found})
    means = [float(head.values(model, cache).mean()) for head in heads]
    return int(np.argmax(means))


def first_below(losses: dict[int, float], level: float) -> int | None:
    """The first step from which on the loss stays below a level."""
    above = [step for step, loss in losses.items() if loss >= level]
    later = [step for step in losses if not above or step > above[-1]]
    return min(later) if later else None


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
