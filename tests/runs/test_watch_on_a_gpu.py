"""A loop on a GPU is recorded and read again: on the stand-in, which refuses to mix devices."""

from __future__ import annotations

from pathlib import Path

import torch
from stand_in import stand_in_gpu
from torch import Tensor, nn

import circuit


def test_a_loop_on_a_gpu(tmp_path: Path) -> None:
    with stand_in_gpu():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to("cuda")
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, foreach=False)
        inputs = torch.randn(8, 3).to("cuda")

        def size(module: nn.Module) -> Tensor:
            return module(inputs).pow(2).mean()

        seen = []
        with circuit.watch(module, optimizer, tmp_path, scalars=[size], anchor_every=3):
            for step in range(5):
                optimizer.zero_grad()
                size(module).backward()
                optimizer.step()
                seen.append({n: p.detach().cpu().clone() for n, p in module.named_parameters()})
                if step == 2:
                    with torch.no_grad():
                        module[0].weight.mul_(0.5)
        run = circuit.open_run(tmp_path, module=module)
        assert run.recording.manifest.environment["device"] == "cuda"
        state = run.state(5).parameters
        assert all(torch.equal(state[name].cpu(), seen[4][name]) for name in seen[4])
        assert "0 bits differ" in run.verify().law
        series = circuit.attribute(run, [size], 0, 5)["size"]
        assert series.closure().path_absolute < 1e-2
        assert "outside_the_optimizer" in series.path
