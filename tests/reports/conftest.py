"""The tiny trained run, its trace, answer scalars of it, and the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tiny_run import RUN, MadeOnce, circuit, traced, traced_once, trained, trained_once

from circuit.config import load_config
from circuit.options import PairOptions
from circuit.reports.answer_scalar_residual_diagnosis import AnswerScalarDiagnosis, DiagnosisOptions
from circuit.reports.report import run_report
from circuit.train_config import TrainConfig

__all__ = ["circuit", "traced", "traced_once", "trained", "trained_once"]


Diagnose = Callable[[str, PairOptions, Sequence[int]], Path]


@pytest.fixture(scope="session")
def diagnose_once(trained_once: Path, made_once: MadeOnce) -> Diagnose:
    """Diagnoses answer scalars between steps of the run, once for each name; the folder."""

    def diagnose(name: str, pairs: PairOptions, steps: Sequence[int]) -> Path:
        def fill() -> None:
            out = Path.cwd() / "answers"
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(trained_once)
                options = DiagnosisOptions(
                    probe_set=RUN / "analysis" / "probe_set.jsonl",
                    checkpoints=tuple(RUN / f"checkpoints/step_{step:06d}.pt" for step in steps),
                    **dict(pairs),
                )
                config = load_config(RUN / "run_config.json", TrainConfig)
                run_report(AnswerScalarDiagnosis, config, options, out)

        return made_once(name, fill) / "answers"

    return diagnose


@pytest.fixture(scope="session")
def diagnosed_once(diagnose_once: Diagnose) -> Path:
    """Answer scalars over 3:6, 6:9 and 9:12: two pair types, both sides."""
    pairs = PairOptions(
        pair_types=("support_value", "recency"), max_pairs_per_type=6, min_pairs_per_type=3
    )
    return diagnose_once("diagnosed", pairs, (3, 6, 9, 12))
