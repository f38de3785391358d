"""What `circuit.watch` costs a loop of nanoGPT's kind, as ratios to the loop as it is.

python benchmarks/watch.py [--width 128] [--layers 4] [--steps 60] [--threads 1]

Loops take their steps in turn: as it is, twice, which tells the noise; with the gradients of every
step kept; with one scalar logged, and, beside it, evaluated by the loop itself, which nothing can
be faster than; with it attributed at every tenth step. Printed are ratios of
medians, by the clock and in processor time; bytes a step; and the law: 100 random steps, or all,
again from their gradients in a fresh process. Exit code 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import circuit
from circuit.core.digests import tensors_digest

FRESH = """
import json, sys
import circuit
from circuit.core.digests import tensors_digest
run = circuit.open_run(sys.argv[1])
steps = sorted(json.loads(sys.argv[2]))
print(json.dumps([tensors_digest(run.state(step).parameters) for step in steps]))
"""
VOCABULARY = 65
"""Characters of nanoGPT's Shakespeare."""


class Block(nn.Module):
    """Attention and MLP behind LayerNorms."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream behind the block."""
        split = self.c_attn(self.ln_1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)  # [3, batch, head, pos, d_head]
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A small GPT with tied embeddings."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.h = nn.ModuleList([Block(width, 4) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


def loop(args: argparse.Namespace, watched: Callable[..., Any] | None) -> Iterator[None]:
    """Trains, a step each time that it is asked for the next."""
    torch.manual_seed(0)
    model = GPT(args.width, args.layers, args.length)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.99),
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    batches = torch.Generator().manual_seed(1)
    with ExitStack() as stack:
        if watched is not None:
            stack.enter_context(watched(model, optimizer))
        while True:
            shape = (args.batch, args.length + 1)
            tokens = torch.randint(0, VOCABULARY, shape, generator=batches)
            logits = model(tokens[:, :-1])
            functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            yield


@contextmanager
def hooked(
    model: nn.Module, optimizer: torch.optim.Optimizer, scalar: Callable[[nn.Module], Tensor]
) -> Iterator[None]:
    """Evaluates a scalar behind every step, and does nothing else."""

    def evaluate(*_: Any) -> None:
        with torch.no_grad():
            float(scalar(model))

    hook = optimizer.register_step_post_hook(evaluate)
    yield
    hook.remove()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    probe = torch.arange(args.length)[None] % VOCABULARY

    def margin(module: nn.Module) -> Tensor:
        logits = module(probe)[0, -1]
        return logits[1] - logits[2]

    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[str, Callable[..., Any] | None] = {
            "as it is": None,
            "as it is, once more": None,
            "gradients kept": lambda m, o: circuit.watch(m, o, f"{folder}/kept"),
            "one scalar evaluated by the loop itself": lambda m, o: hooked(m, o, margin),
            "one scalar logged": lambda m, o: circuit.watch(
                m, o, scalars=[margin], attribute=False
            ),
            "one scalar attributed, every 10th step": lambda m, o: circuit.watch(
                m, o, scalars=[margin], every=10
            ),
        }
        clock, processor = measure({k: loop(args, w) for k, w in kinds.items()}, args.steps)
        size = sum(p.numel() for p in GPT(args.width, args.layers, args.length).parameters())
        print(f"{size} parameters, {args.steps} steps, {args.threads} threads")
        for kind in kinds:
            ours, base = statistics.median(clock[kind]), statistics.median(clock["as it is"])
            cpu = sum(processor[kind]) / sum(processor["as it is"])
            mean = sum(clock[kind]) / sum(clock["as it is"])
            print(
                f"{kind:40} {1e3 * ours:7.1f} ms a step; times the loop as it is:"
                f" {ours / base:.3f} (median), {mean:.3f} (mean), {cpu:.3f} (processor time)"
            )
        run = circuit.open_run(f"{folder}/kept")
        disk = sum(p.stat().st_size for p in Path(folder, "kept").rglob("*") if p.is_file())
        print(
            f"disk: {disk / args.steps / 1e6:.2f} MB a step, {4 * size / 1e6:.2f} of it a gradient"
        )
        begin = time.perf_counter()
        expected = {step: tensors_digest(run.state(step).parameters) for step in run.steps}
        again = (time.perf_counter() - begin) / args.steps
        print(f"a step again from its gradient: {1e3 * again:.1f} ms")
        steps = random.Random(0).sample(run.steps, min(100, len(run.steps)))
        words = [sys.executable, "-c", FRESH, f"{folder}/kept", json.dumps(steps)]
        digests = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
        pairs = zip(sorted(steps), digests, strict=True)
        equal = sum(expected[step] == digest for step, digest in pairs)
    print(f"{equal} of {len(steps)} random steps equal in a fresh process, 0 bits differ")
    sys.exit(equal != len(steps))


def measure(
    loops: dict[str, Iterator[None]], steps: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every step of every loop, by the clock and of processor time, taken in turn."""
    clock: dict[str, list[float]] = {kind: [] for kind in loops}
    processor: dict[str, list[float]] = {kind: [] for kind in loops}
    turn = list(loops.items())
    for number in range(steps):
        turn = turn[1:] + turn[:1]  # whoever comes first finds other caches
        for kind, one in turn:
            begin, used = time.perf_counter(), time.process_time()
            next(one)
            if number >= 3 or steps < 10:  # the first ones fill caches
                clock[kind].append(time.perf_counter() - begin)
                processor[kind].append(time.process_time() - used)
    for one in loops.values():
        one.close()  # type: ignore[attr-defined]
    return clock, processor


if __name__ == "__main__":
    main()
