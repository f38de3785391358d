"""What scanning a series of checkpoints takes of memory, in weights of one.

    python benchmarks/series.py [--members 1 3]

Writes small changes of one GPT-NeoX of 67 million weights by `save_pretrained`, and scans so many
of them, each time in a process of its own: peak memory above that of the imports, over the
weights of one checkpoint. The peak must not grow with the number of checkpoints.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from circuit.reports.report import run_report
from circuit.reports.series_scan import SeriesOptions, SeriesScan


def main() -> None:
    """Write, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--scan", type=Path, nargs="+", help="checkpoints: measure this process")
    args = parser.parse_args()
    if args.scan:
        print(peak(args.scan))
        return
    with tempfile.TemporaryDirectory() as folder:
        paths, megabytes = write_series(Path(folder), max(args.members))
        print(f"a checkpoint: {megabytes:.0f} MB of weights")
        for count in args.members:
            command = [sys.executable, __file__, "--scan", *map(str, paths[:count])]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(f"{count} checkpoints: {float(told) / megabytes:.1f} times its weights")


def write_series(folder: Path, members: int) -> tuple[list[Path], float]:
    """Folders of `save_pretrained`, and the weights of one in MB."""
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "num_hidden_layers": 5, "num_attention_heads": 8}
    config = GPTNeoXConfig(
        **shape, intermediate_size=4096, max_position_embeddings=32, vocab_size=2000
    )
    model = GPTNeoXForCausalLM(config)
    paths = [folder / f"step{step}" for step in range(members)]
    for path in paths:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-4 * torch.randn_like(parameter))
        model.save_pretrained(path, safe_serialization=True)
    return paths, sum(parameter.nbytes for parameter in model.parameters()) / 1e6


def peak(paths: list[Path]) -> float:
    """MB above what this process has taken before, while it scans."""
    import transformer_lens  # noqa: F401  so that its import does not count

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as out:
        options = SeriesOptions(series=tuple(paths), strings=2, length=6)
        run_report(SeriesScan, None, options, Path(out) / "scan")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6


if __name__ == "__main__":
    main()
