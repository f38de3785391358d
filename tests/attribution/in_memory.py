"""A run whose steps are executed again from the start, without a trace on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from circuit.core.edit import Edit
from circuit.core.graphs import Graphs
from circuit.trace.step import TracedStep, Tracer
from circuit.training.session import TrainingSession
from circuit.training.setup import Setup


@dataclass
class InMemory:
    """What credit and influence ask of a run."""

    setup: Setup
    anchors: list[int] = field(default_factory=lambda: [0, 2])

    def module(self, dtype: torch.dtype | None = None) -> Any:
        return self.setup.module(dtype)

    def session(self, edit: Edit | None = None) -> TrainingSession:
        return TrainingSession(self.setup.with_config(self.setup.config.replace(edit=edit)))

    def replay(self, start: int, end: int, graphs: Graphs | None = None) -> Iterator[TracedStep]:
        tracer = Tracer(self.session())
        tracer.session.graphs = graphs
        for step in range(1, end + 1):
            traced = tracer.advance()
            if step > start:
                yield traced
