"""Counterfactual training: the steps of a run taken again with something otherwise.

The steps are those of training (`training_step`), from a state of the run on; an edit that changes
nothing gives the run, bit for bit.
"""

from __future__ import annotations

from circuit.core.edit import Edit
from circuit.core.state import FlatState
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.trace.step import TracedStep, Tracer
from circuit.training.optimizers import update_rule
from circuit.training.session import TrainingSession


def train_otherwise(session: TrainingSession, edit: Edit, end: int) -> FlatState:
    """Train on from where a session stands to state `end`.

    Raises:
        CircuitError: the optimizer has no such term, an example occurs in no step of the edit, or
            the training diverges.
    """
    names = (*update_rule(session.config.optimizer).names, "rounding")
    unknown = next((name for name in edit.terms if name not in names), None)
    if unknown is not None:
        raise CircuitError(
            f"the update has no term '{unknown}'", expected=f"one of {', '.join(names)}"
        )
    tracer = Tracer(session)
    missing = set(edit.examples)
    while session.step < end:
        step = session.step + 1
        if not edit.holds(step):
            tracer.advance()
            continue
        ids = session.recipe.examples(step).sample_ids
        missing -= set(ids)
        factors = edit.weights(ids)
        traced = tracer.advance(weights=None if factors is None else torch.tensor(factors))
        _scale_terms(tracer, traced, edit)
    if missing:
        raise CircuitError(
            f"example '{min(missing)}' occurs in no step of {edit.start}:{min(edit.end, end)}",
            expected="examples of the batches of these steps",
        )
    return tracer.state


def _scale_terms(tracer: Tracer, traced: TracedStep, edit: Edit) -> None:
    """Put the weights where the step would have led with its terms scaled."""
    scaled = {name: factor for name, factor in edit.terms.items() if factor != 1.0}
    if scaled:
        terms, after = traced.update.named(), traced.after.parameters
        moved = after.double() + sum((f - 1) * terms[name] for name, f in scaled.items())
        tracer.put(moved.to(after.dtype))
