"""Truth by intervention: contributions of terms against applying them alone and leaving them out.

    python benchmarks/intervention.py TRACE PROBE_SET --head L1H2 --steps 2400 2600 2800

In float64, for each step: the path share of every term, the value of definitions.md section 5 from
interventions, and their difference as the step is halved. The order of the difference comes last:
3 means third order in the step.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from circuit.attribution.attribute import Attributor
from circuit.attribution.intervention import effects
from circuit.model.build import build_model
from circuit.reports.inputs import traced_inputs
from circuit.scalars.qk_match import QKMatches
from circuit.trace.replay import ReplayedRun

SCALES = (4.0, 2.0, 1.0, 0.5)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("probe_set", type=Path)
    parser.add_argument("--head", default="L1H2")
    parser.add_argument("--steps", type=int, nargs="+", required=True)
    args = parser.parse_args()
    trace = ReplayedRun.open(args.trace)
    config = trace.manifest.config
    scalars = QKMatches(heads=(args.head,)).build(traced_inputs(config, args.probe_set, trace))
    model = build_model(
        config.model,
        vocabulary_size=trace.setup.benchmark.vocabulary.size,
        seed=config.seed,
        dtype=torch.float64,
    )
    attributor = Attributor(model, scalars, rule="gauss:4")
    orders = []
    for number in args.steps:
        (traced,) = trace.replay(number - 1, number)
        theta, terms = traced.before.parameters, traced.update.named()
        print(f"step {number}, {scalars[0].name}")
        apart: dict[str, list[float]] = {name: [] for name in terms}
        for scale in SCALES:
            for name, found in effects(attributor, theta, terms, scale=scale).items():
                path, value = float(found.path), float(found.value)
                apart[name].append(abs(path - value))
                if scale == 1.0:
                    print(
                        f"  {name:26} path {path:+.6e}  by intervention {value:+.6e}"
                        f"  (alone {float(found.alone):+.3e}, but one {float(found.but_one):+.3e})"
                    )
        for name, errors in apart.items():
            if name == "rounding":
                continue
            shown = "  ".join(
                f"x{scale:g} {error:.1e}" for scale, error in zip(SCALES, errors, strict=True)
            )
            order = math.log2(errors[0] / errors[-1]) / math.log2(SCALES[0] / SCALES[-1])
            orders.append(order)
            print(f"  {name:26} difference {shown}  order {order:.2f}")
    print(f"median order of the difference in the step: {sorted(orders)[len(orders) // 2]:.2f}")


if __name__ == "__main__":
    main()
