"""The LDS of a report of `circuit study data-attribution`, beside that of dattri.

    pip install 'circuit-formation[bench]'
    python benchmarks/lds.py REPORT REPLAYS

Gives the scores and the trainings of a report to `dattri.metric.lds`, which sums over the examples
that were kept, and prints by how much its correlations differ from the report's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from dattri.metric import lds

from circuit.artifacts import read_jsonl
from circuit.attribution.scores import read_scores


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("replays", type=Path)
    args = parser.parse_args()
    rows = read_jsonl(args.report / "data_attribution_rows.jsonl")
    trainings = read_jsonl(args.report / "data_attribution_trainings.jsonl")
    scalars = list(dict.fromkeys(row["scalar"] for row in rows))
    most, count = 0.0, 0
    for window, share in dict.fromkeys((row["window"], row["share"]) for row in trainings):
        folder = args.replays / window.replace(":", "_")
        sets = [row for row in trainings if (row["window"], row["share"]) == (window, share)]
        for path in sorted(folder.glob("*.npz")):
            scores = read_scores(path)
            kept = [
                [at for at, name in enumerate(scores.examples) if name not in row["examples"]]
                for row in sets
            ]
            values = torch.tensor([row["changes"] for row in sets], dtype=torch.float64)
            theirs, _ = lds(torch.tensor(scores.scores.T.copy()), (values, torch.tensor(kept)))
            for at, scalar in enumerate(scalars):
                (ours,) = (
                    row["lds"]
                    for row in rows
                    if (row["window"], row["share"], row["scalar"], row["method"])
                    == (window, share, scalar, scores.method)
                )
                most, count = max(most, abs(ours - float(theirs[at]))), count + 1
    print(f"{count} scores of windows, shares, scalars and methods: at most {most:.1e} apart")


if __name__ == "__main__":
    main()
