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
from circuit.training.session import TrainingSession


def train_otherwise(session: TrainingSession, edit: Edit, end: int) -> FlatState:
    """Train on from where a session stands to state `end`.

    Raises:
        CircuitError: the edit goes beyond the end, the optimizer has no such term, an example
            occurs in no step of the edit, or the training diverges.
    """
    tracer = Tracer(session)
    _check(tracer, edit, end)
    while session.step < end:
        step = session.step + 1
        if not edit.holds(step):
            tracer.advance()
            continue
        factors = None
        if edit.examples:  # of terms alone no batch need be drawn to know its names
            factors = edit.weights(session.recipe.examples(step).sample_ids)
        traced = tracer.advance(weights=None if factors is None else torch.tensor(factors))
        _scale_terms(tracer, traced, edit)
    return tracer.state


def _check(tracer: Tracer, edit: Edit, end: int) -> None:
    """Refuse what the steps do not have, before one of them is taken."""
    if edit.end > end:
        raise CircuitError(
            f"an edit of steps {edit.start}:{edit.end}", expected=f"steps up to {end}, the end"
        )
    names = (*tracer.terms, "rounding")
    unknown = next((name for name in edit.terms if name not in names), None)
    if unknown is not None:
        raise CircuitError(
            f"the update has no term '{unknown}'", expected=f"one of {', '.join(names)}"
        )
    missing = set(edit.examples)
    for step in range(edit.start + 1, edit.end + 1):
        if not missing:
            return
        missing -= set(tracer.session.recipe.examples(step).sample_ids)
    if missing:
        raise CircuitError(
            f"example '{min(missing)}' occurs in no step of {edit.start}:{edit.end}",
            expected="examples of the batches of these steps",
        )


def _scale_terms(tracer: Tracer, traced: TracedStep, edit: Edit) -> None:
    """Put the weights where the step would have led with its terms scaled."""
    scaled = {name: factor for name, factor in edit.terms.items() if factor != 1.0}
    if scaled:
        terms, after = traced.update.named(), traced.after.parameters
        moved = after.double() + sum((f - 1) * terms[name] for name, f in scaled.items())
        tracer.put(moved.to(after.dtype))
