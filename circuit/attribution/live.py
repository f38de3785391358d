"""circuit.watch: what an untouched training loop does to its parameters, step by step.

    with circuit.watch(module, optimizer, "artifacts/mine", scalars=[margin]):
        for batch in data:                         # your loop, as it is
            ...
            optimizer.step()

    run = circuit.open_run("artifacts/mine", module=module)
    circuit.attribute(run, [margin], 0, 100)

The loop's bits are the same with and without it.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.attribution.attribute import Attributor
from circuit.core.flat import ParameterLayout, norm
from circuit.core.module import evaluated, load_buffers
from circuit.errors import CircuitError, several
from circuit.lazy import no_grad, np, torch
from circuit.plugins import refuse_while_importing
from circuit.runs.recorded_step import RecordedStep
from circuit.runs.recording import KEEPS, Keep
from circuit.runs.storing import Storage
from circuit.runs.watching import Watcher
from circuit.scalars.base import Measure, Scalar, SharedBatch, all_measured
from circuit.sinks import Sink, as_function, flattened
from circuit.sizes import disk_limit, recording_disk, shown

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("circuit.watch")


class Watching:
    """What `watch` gives: what it has measured so far.

    Attributes:
        rows: the numbers of every `every`-th step: rates, norms, terms, scalars.
        disk: bytes that a step and that a stored state take.
    """

    def __init__(self, watcher: Watcher, storage: Storage | None, disk: tuple[int, int]) -> None:
        self._watcher, self._storage = watcher, storage
        self.disk = disk
        self.rows: list[dict[str, Any]] = []

    def __repr__(self) -> str:
        size, state = map(shown, self.disk)
        kept = f"{size} a step, {state} a stored state" if self.folder else "nothing is written"
        return f"Watching({self.folder or 'no folder'}: {self.step} steps so far; {kept})"

    @property
    def step(self) -> int:
        """Optimizer steps taken so far."""
        return self._watcher.step

    @property
    def folder(self) -> Path | None:
        """Where the recording stands."""
        return None if self._storage is None else self._storage.root


@contextmanager
def watch(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    folder: str | Path | None = None,
    *,
    scalars: Sequence[Scalar | Measure] = (),
    keep: Keep = "gradients",
    every: int = 1,
    sinks: Sequence[Sink] = (),
    attribute: bool = True,
    rule: str = "simpson",
    anchor_every: int = 50,
    steps: int | None = None,
    decoupled_decay: bool = False,
    overwrite: bool = False,
    resume: bool = False,
) -> Iterator[Watching]:
    """Watch the optimizer steps of a training loop, which stays as it is.

    The gradient counts as the optimizer reads it: accumulated, unscaled and clipped. With several
    optimizers every call of any of them is a step.

    Args:
        module: that is trained.
        optimizer: that moves it, or several. torch's AdamW, Adam and SGD are split into decay,
            current gradient and history; of any other, what is not decoupled decay is `rest`.
        folder: where it is recorded; without one, nothing is written.
        scalars: functions `module -> number(s)`, or circuit Scalars where the module is a
            HookedTransformer; evaluated on a copy in evaluation mode.
        keep: `gradients`: every step can be executed again, so that every state is there, bit for
            bit; `states`: the state of every `every`-th step; `rows`: numbers alone.
        every: steps between measurements.
        sinks: where the numbers of every `every`-th step go besides (`circuit.sinks`).
        attribute: split the change of the scalars by terms and parameter groups; if not, their
            values after the step are all that is measured.
        rule: path rule of the attribution, of `circuit.core.paths.path_rule`.
        anchor_every: steps between stored states, where gradients are kept.
        steps: how many there are going to be, if that is known: the disk is held against it.
        decoupled_decay: whether the weight decay of an optimizer that is not torch's multiplies
            the weights by `1 - lr * weight_decay`, as that of Lion does.
        overwrite: replace an earlier recording in the folder.
        resume: go on with the recording in the folder, or begin one where there is none. Module and
            optimizers have to be in the state that one of its steps left, bit for bit, as from the
            loop's own checkpoint; what it holds of later steps is recorded again.

    Raises:
        CircuitError: on entering: an argument is none of these; there is nothing of the recording
            to go on from; the optimizer's parameters are not
            the module's, or half precision; the folder is not free, or the disk is too small. At a
            step: it cannot be taken again from its gradient, or written.
    """
    refuse_while_importing("trains under circuit.watch")
    several_given = isinstance(optimizer, Iterable)  # no optimizer is, nor most modules
    optimizers: list[Any] = list(optimizer) if several_given else [optimizer]  # type: ignore[arg-type]
    _check(keep, every, anchor_every, steps, module, optimizers)
    _check_resume(resume, overwrite, keep, folder)
    watcher = Watcher(module, optimizers, decoupled_decay=decoupled_decay)
    size = watcher.layout.size * (8 if watcher.dtype == "torch.float64" else 4)
    # of a state's moments nothing is known before the first step: AdamW's two count
    disk = recording_disk(
        keep, size, 2 * size, steps=steps or 1, every=every, anchor_every=anchor_every
    )
    with ExitStack() as stack:
        storage = None
        if folder is not None:
            storage = stack.enter_context(
                Storage(
                    folder,
                    keep=keep,
                    every=every,
                    anchor_every=anchor_every,
                    overwrite=overwrite,
                    resume=resume,
                )
            )
        a_step = size if keep == "gradients" else 0
        watching = Watching(watcher, storage, (a_step, 0 if keep == "rows" else 3 * size))
        if scalars or sinks or keep == "rows":
            measure = _Measure(
                watching, module, scalars, sinks, storage, rule if attribute else None
            )
            watcher.observe(measure, every=every, whole=measure.whole or keep == "rows")
        if storage is not None:  # nothing is dropped before all that can be refused has been
            manifest = watcher.manifest(keep, every, anchor_every)
            earlier = storage.prepare(manifest, disk)
            if earlier is not None:
                storage.go_on(watcher.go_on(earlier, manifest))
            watcher.store(storage)
            _say(watching, storage.root, steps, disk)
        stack.enter_context(watcher)
        yield watching


def _check(
    keep: str,
    every: int,
    anchor_every: int,
    steps: int | None,
    module: object,
    optimizers: Sequence[Any],
) -> None:
    if keep not in KEEPS:
        raise CircuitError(f"'{keep}'", where="`keep`", expected=" or ".join(KEEPS))
    for name, value in (("every", every), ("anchor_every", anchor_every), ("steps", steps)):
        if value is not None and value < 1:
            raise CircuitError(f"{value}", where=f"`{name}`", expected="at least 1")
    if not isinstance(module, torch.nn.Module):
        raise CircuitError(
            f"{type(module).__name__} as module",
            where="`module`",
            expected="an nn.Module",
            fix="circuit.watch(module, optimizer, folder) is the order",
        )
    odd = [one for one in optimizers if not isinstance(one, torch.optim.Optimizer)]
    if len({id(one) for one in optimizers}) < len(optimizers):
        raise CircuitError("one optimizer twice", where="`optimizer`", expected="each once")
    if odd or not optimizers:
        raise CircuitError(
            f"{type(odd[0]).__name__ if odd else 'nothing'} as optimizer",
            where="`optimizer`",
            expected="a torch.optim.Optimizer, or several",
            fix="of a wrapper, pass what it wraps (usually wrapper.optimizer)",
        )


def _check_resume(resume: bool, overwrite: bool, keep: str, folder: object) -> None:
    if resume and (overwrite or keep == "rows" or folder is None):
        if overwrite:
            raise CircuitError(
                "`resume` and `overwrite` exclude each other", fix="pass one of them"
            )
        lacking = "no `folder`" if folder is None else "`keep` rows, which holds no state"
        raise CircuitError(
            f"`resume` with {lacking}",
            expected="the folder of a recording that keeps gradients or states, to go on from",
        )


def _say(watching: Watching, root: Path, steps: int | None, disk: dict[str, int]) -> None:
    """What it is going to take, before the first step."""
    step, state = watching.disk
    total = f", {shown(sum(disk.values()))} for {steps} steps" if steps else ""
    logger.info(
        "recording into %s: %s a step and about %s a stored state%s; %s are free",
        root, shown(step), shown(state), total, shown(disk_limit(root)),
    )  # fmt: skip


class _Measure:
    """Measures every so many steps, and hands the numbers on."""

    def __init__(
        self,
        watching: Watching,
        module: nn.Module,
        scalars: Sequence[Scalar | Measure],
        sinks: Sequence[Sink],
        storage: Storage | None,
        rule: str | None,
    ) -> None:
        self.watching, self.storage = watching, storage
        self.scalars = all_measured(scalars)
        self.sinks = [as_function(sink) for sink in several(sinks, "sinks")]
        self.attributor: Attributor | None = None
        self.values: _Values | None = None
        if scalars and rule is not None:
            self.attributor = Attributor(evaluated(module), self.scalars, rule=rule)
        elif scalars:
            self.values = _Values(module, self.scalars)
        self.whole = self.attributor is not None or not scalars  # sinks alone get the step's own
        self.device = next(module.parameters()).device

    def __call__(self, number: int, step: RecordedStep | None) -> None:
        """Measure a step that has just been taken."""
        with _apart(self.device):
            row = {"step": number, **self._numbers(step)}
        self.watching.rows.append(row)
        if self.storage is not None:
            self.storage.add_row(row)
        for sink in self.sinks:
            sink(number, flattened(row))

    def _numbers(self, step: RecordedStep | None) -> dict[str, Any]:
        row: dict[str, Any] = {}
        if step is not None:
            row = _of_step(step)
        if self.attributor is not None:
            assert step is not None
            rows = self.attributor.step(step).rows(("circuit",))
            row["scalars"] = {one["scalar"]: one["after"] for one in rows}
            row["attribution"] = {one["scalar"]: _shares(one) for one in rows}
        elif self.values is not None:
            row["scalars"] = self.values()
        return row


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Scalars see nothing of the loop's modes, and the loop nothing of the numbers they draw."""
    python, numpy = random.getstate(), np.random.get_state()
    drawn = [device] if device.type == "cuda" and torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=drawn))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", device.type}:  # it keeps the weights of a node for the next
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class _Values:
    """Scalars on a copy of a module, which follows it; all that does not change is asked once."""

    def __init__(self, module: nn.Module, scalars: Sequence[Scalar]) -> None:
        self.module, self.scalars = module, scalars
        self.shared = SharedBatch.merge(scalars, device=str(next(module.parameters()).device))
        self._copy()

    def _copy(self) -> None:
        self.copy: Any = evaluated(self.module)
        self.pairs = list(zip(self.copy.parameters(), self.module.parameters(), strict=True))

    @no_grad
    def __call__(self) -> dict[str, float]:
        """Their means, by name, under the weights and buffers that the module has now."""
        buffers = dict(self.module.named_buffers())
        if buffers.keys() != dict(self.copy.named_buffers()).keys():
            self._copy()
        for ours, theirs in self.pairs:
            ours.copy_(theirs)
        if buffers:
            load_buffers(self.copy, buffers)
        bound = [scalar.bind(self.copy) for scalar in self.scalars]
        values = self.shared.values(self.copy, bound)
        return {
            scalar.name: float(of.double().mean())
            for scalar, of in zip(self.scalars, values, strict=True)
        }


def _of_step(step: RecordedStep) -> dict[str, Any]:
    """Rates and norms, parameter by parameter: all float64 vectors at once are never held."""
    taken, squares, ulps = step.taken, Counter[str](), [0.0]
    for name, shape in zip(step.layout.names, step.layout.shapes, strict=True):
        update = taken.terms(ParameterLayout.of_shapes({name: shape}))
        ulps.append(update.rounding_ulps())
        vectors = {**update.named(), "/update": update.total, "/parameter": taken.after[name]}
        if name in taken.gradient:
            vectors["/gradient"] = taken.gradient[name]
        squares.update({column: norm(vector) ** 2 for column, vector in vectors.items()})
    norms = {column: math.sqrt(square) for column, square in squares.items()}
    return {
        "lr": step.lr,
        **({"lr_by_group": step.lr_by_group} if len(taken.groups) > 1 else {}),
        **{f"{of}_norm": norms.pop(f"/{of}", 0.0) for of in ("gradient", "parameter", "update")},
        "term_norms": norms,
        "rounding_ulps": float(np.max(ulps)),  # not a number where one of them is not
    }


def _shares(row: dict[str, Any]) -> dict[str, Any]:
    """What is told of a scalar in a step: its change, the terms' shares, and those of groups."""
    groups = row["groups"]["circuit"]
    return {
        "actual": row["actual"],
        "terms": row["path"],
        "groups": {name: sum(of["path"].values()) for name, of in groups.items()},
    }
