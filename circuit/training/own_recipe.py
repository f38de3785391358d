"""Recipes of somebody's own: a Python file's class as what the exact trainer executes.

    circuit train --recipe my_run.py:Sums --output-dir runs/sums

The class is a `circuit.Recipe`. It is told the seed, and everything that its methods draw from
torch, NumPy or `random` is drawn from a generator that is seeded anew for every step, by (seed,
step): dropout and `torch.randint` are functions of the step, too.

Its code is executed only where whoever runs it names the file (`RecipeConfig.code`), and only if
the file and what it imports from beside itself are the recorded ones, by sha256.
"""

from __future__ import annotations

import inspect
import random
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.config import parse_config
from circuit.core.digests import identical
from circuit.core.optimizers import groups_of, names_by_id, rule_of
from circuit.errors import CircuitError, told
from circuit.lazy import np, torch
from circuit.overrides import Overrides, apply_overrides
from circuit.plugins import (
    code_digests,
    import_as,
    import_file,
    let_import_from,
    nearest,
    refuse_changed_code,
)
from circuit.reading import checked_path
from circuit.train_config import RecipeConfig, TrainConfig
from circuit.training.recipe import Batch, Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

    from circuit.training.recipe import Losses

_NO_FILE = "the recipe's file cannot be read: there is none"
_DTYPES = ("torch.float32", "torch.float64")
_ASKED = (
    *("module", "batch", "outputs", "losses", "loss", "optimizer", "accuracy"),
    *("rates", "decays"),
)
"""What somebody's own recipe says; how steps are taken and kept is the trainer's."""


def recipe_config(
    code: str,
    output_dir: str | Path,
    *,
    seed: int | None = None,
    steps: int | None = None,
    overrides: Sequence[str] = (),
) -> RecipeConfig:
    """The config of a run of a recipe, which is executed to know its defaults.

    Args:
        code: `FILE:NAME`.
        output_dir: of the run.
        seed: 0 by default.
        steps: the recipe's own by default.
        overrides: `field=value`, as for `load_config`.

    Raises:
        CircuitError: there is no such file or class, or a field is not allowed.
    """
    path, name = _split(code)
    digests = code_digests(path, missing=_NO_FILE)
    digest = digests.pop(path.name)
    kind = _class_of(code)
    payload: dict[str, Any] = {
        "name": name,
        "output_dir": str(output_dir),
        "seed": 0 if seed is None else seed,
        "steps": kind.steps if steps is None else steps,
        "checkpoint_every": kind.checkpoint_every,
        "log_every": kind.log_every,
        "recipe": {"file": path.name, "name": name, "sha256": digest, "imports": digests},
    }
    payload = apply_overrides(payload, overrides, RecipeConfig)
    config = parse_config(payload, TrainConfig, where=code, overrides=overrides)
    assert isinstance(config, RecipeConfig), "it has a recipe"
    if overrides:
        config._overrides = Overrides(config=code, set=list(overrides), earlier=None)
    return config.executing(code)


def check_code(config: RecipeConfig) -> str:
    """`FILE:NAME` of a recipe that may be executed; nothing is yet.

    Raises:
        CircuitError: nobody has named it here, or the file or class is another.
    """
    recipe, code = config.recipe, config.code
    if code is None:
        raise CircuitError(
            f"the run is of the recipe {recipe.word}, code that is executed only where it is named",
            where=f"run {config.name}",
            fix=f"name its file: `recipe` {recipe.word}",
        )
    path, name = _split(code)
    digests = code_digests(path, missing=_NO_FILE)
    if name != recipe.name:
        raise CircuitError(f"the run is of another class, {recipe.name}", where=code)
    recorded = {path.name: recipe.sha256, **(recipe.imports or {})}
    if recipe.imports is None:  # of a run from before imports were looked at
        digests = {path.name: digests[path.name]}
    refuse_changed_code(
        digests,
        recorded,
        where=path.parent,
        since="the run",
        fix=f"bring it back as it was (of {path.name} a copy under any name does), or train anew",
    )
    return code


def load_recipe(config: RecipeConfig) -> OwnRecipe:
    """The recipe of a run.

    Raises:
        CircuitError: as `check_code`; or the class is no recipe, or cannot be made.
    """
    code = check_code(config)
    kind = _class_of(code)
    _seed_all(config.seed, 0)
    with _told(code, "__init__"):
        recipe = kind(config.seed)
    return OwnRecipe(recipe, config, code)


def _split(code: str) -> tuple[Path, str]:
    file, colon, name = code.rpartition(":")
    if not colon or not name.isidentifier() or not file.endswith(".py"):
        raise CircuitError(
            f"'{code}'", where="`recipe`", expected="FILE.py:CLASS, such as my_run.py:Sums"
        )
    return checked_path(file), name


def _class_of(code: str) -> type[Recipe]:
    """The class that is named; its file is executed.

    Raises:
        CircuitError: the file cannot be executed, or has no such recipe.
    """
    path, name = _split(code)
    let_import_from(path.absolute().parent)
    _seed_all(0, 0)  # what it draws while it is imported
    with _told(code, "the file"):
        module = import_file(path, missing=_NO_FILE)
    import_as(path.stem, module)  # of a scalar's file that imports it, too
    kind = getattr(module, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Recipe)):
        what = f"'{name}' is no recipe" if kind is not None else f"has no '{name}'"
        fix = nearest(name, module) if kind is None else None
        raise CircuitError(what, where=path, expected="a class of circuit.Recipe", fix=fix)
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise CircuitError(f"'{name}' does not define {missing}", where=path)
    for other in vars(Recipe).keys() - {"__init__", *_ASKED}:
        if callable(method := getattr(kind, other)) and method is not getattr(Recipe, other):
            raise CircuitError(
                f"'{name}' defines {other}, which nobody would ask",
                where=path,
                expected=f"some of {', '.join(_ASKED)}",
                fix="call it otherwise",
            )
    return kind


def _seed_all(seed: int, step: int) -> None:
    """Seed every generator by (seed, step); NumPy's SeedSequence is the same for good (NEP 19)."""
    first, second = np.random.SeedSequence([seed, step]).generate_state(2).tolist()
    # without a device torch.manual_seed formats three stacks that nothing reads, which takes longer
    # than many a step
    everywhere = torch.accelerator.is_available()
    seed_torch = torch.manual_seed if everywhere else torch.default_generator.manual_seed
    seed_torch(first << 32 | second)
    np.random.seed(first)
    random.seed(first << 32 | second)


@contextmanager
def _told(code: str, what: str) -> Iterator[None]:
    """Say in one line where somebody's code has failed."""
    try:
        yield
    except (CircuitError, KeyboardInterrupt):
        raise
    except BaseException as error:  # it is anybody's code
        file = _split(code)[0]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [one.lineno for one in frames if Path(one.filename).name == file.name]
        where = f"{file}:{lines[-1]}" if lines else str(file)
        raise CircuitError(f"{what} raised {told(error)}", where=where) from error


class OwnRecipe(Recipe):
    """A recipe of somebody's own, seeded, with what it gives held against what a step needs.

    Attributes:
        of: the recipe.
        code: `FILE:NAME`.
    """

    def __init__(self, of: Recipe, config: RecipeConfig, code: str) -> None:
        super().__init__(config.seed)
        self.of, self.code, self.device = of, code, config.device
        self.clip, self.decoupled_decay = of.clip, of.decoupled_decay
        self._groups: int | None = None  # of its optimizer, once one was asked for
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise CircuitError(
                f"clip is {self.clip}", where=code, expected="None, or a finite number above 0"
            )

    def prove(self) -> None:
        """Call it again: weights and batches have to be functions of seed and step. Take step 1.

        What is refused here leaves no folder of a run that has not begun.

        Raises:
            CircuitError: names what is another at the second call, or what the step cannot use.
        """
        from circuit.training.step import training_step  # which imports torch

        first, again = (_tensors(self.module()) for _ in range(2))
        for name in {**first, **again}:
            if name not in first or name not in again or not identical(first[name], again[name]):
                self._refuse(f"module() gives another {name} at its second call")
        batch, _, same = (self.batch(step) for step in (1, 2, 1))
        for what in ("inputs", "targets"):
            if not identical(getattr(batch, what), getattr(same, what)):
                self._refuse(f"batch(1) gives other {what} when it is called again after batch(2)")
        if batch.examples.tolist() != same.examples.tolist():
            self._refuse("batch(1) gives other examples when it is called again after batch(2)")
        module = self.module()
        optimizer = self.optimizer(module)
        with self.watched(module, optimizer, 1):
            training_step(self, module, optimizer, 1)

    def _refuse(self, what: str) -> None:
        raise CircuitError(
            what,
            where=self.code,
            expected="the same whenever it is called",
            fix="keep nothing between calls: what a step reads is a function of seed and step",
        )

    def module(self) -> nn.Module:
        """See `Recipe.module`."""
        _seed_all(self.seed, 0)
        with _told(self.code, "module()"):
            module: Any = self.of.module()
        expected = "an nn.Module with parameters of float32 or float64, all of one dtype"
        if not isinstance(module, torch.nn.Module):
            what = f"module() gives {type(module).__name__}"
            raise CircuitError(what, where=self.code, expected=expected)
        dtypes = {str(parameter.dtype) for parameter in module.parameters()}
        if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
            held = ", ".join(sorted(dtypes)) or "no parameters"
            raise CircuitError(f"module() has {held}", where=self.code, expected=expected)
        with _told(self.code, "module()"):
            # a HookedTransformer's own `to` prints
            placed: nn.Module = torch.nn.Module.to(module, self.device)
        return placed

    def batch(self, step: int) -> Batch:
        """See `Recipe.batch`; the forward pass that follows draws from the same generators."""
        _seed_all(self.seed, step)
        with _told(self.code, "batch()"):
            batch: Any = self.of.batch(step)
        if not isinstance(batch, Batch):
            what = f"batch() gives {type(batch).__name__}"
            raise CircuitError(what, where=self.code, expected="a circuit.Batch")
        with _told(self.code, "batch()"):
            numbers = np.asarray(batch.examples)
            inputs, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
        if (
            numbers.ndim != 1
            or numbers.dtype.kind not in "iu"
            or not len(inputs) == len(targets) == len(numbers)
            or not len(inputs)
            or (numbers < 0).any()
        ):
            raise CircuitError(
                f"batch({step}) gives {len(inputs)} inputs, {len(targets)} targets and"
                f" {' x '.join(map(str, numbers.shape))} numbers of examples of {numbers.dtype}",
                where=self.code,
                expected="one input, one target and one number, from 0, of each example",
            )
        numbers = numbers.astype(np.int64)
        held: Batch = replace(batch, inputs=inputs, targets=targets, examples=numbers)
        return held

    def outputs(self, module: nn.Module, batch: Batch) -> Tensor:
        """See `Recipe.outputs`."""
        with _told(self.code, "outputs()"):
            return self.of.outputs(module, batch)

    def losses(self, outputs: Tensor, batch: Batch) -> Losses:
        """See `Recipe.losses`.

        Raises:
            CircuitError: they are not one a example, and more by position.
        """
        with _told(self.code, "losses()"):
            losses = self.of.losses(outputs, batch)
        examples = len(batch.inputs)
        if not isinstance(losses, torch.Tensor) or not losses.ndim or len(losses) != examples:
            shape = list(losses.shape) if isinstance(losses, torch.Tensor) else type(losses)
            raise CircuitError(
                f"losses() gives {shape}",
                where=self.code,
                expected=f"a tensor of [{examples}, ...], the share of each example in the loss",
                fix="reduction='none', divided by batch.size for a mean",
            )
        return losses

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """See `Recipe.loss`; the sum of the losses, unless the recipe sums them up itself."""
        if not self._says("loss"):
            return self.losses(outputs, batch).sum()
        with _told(self.code, "loss()"):
            return self.of.loss(outputs, batch)

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """See `Recipe.optimizer`.

        Raises:
            CircuitError: it is none, or of parameters that are not the module's, or one whose
                updates are not split.
        """
        with _told(self.code, "optimizer()"):
            optimizer: Any = self.of.optimizer(module)
        if not isinstance(optimizer, torch.optim.Optimizer):
            what = f"optimizer() gives {type(optimizer).__name__}"
            raise CircuitError(what, where=self.code, expected="a torch.optim.Optimizer")
        kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        for group in groups_of(optimizer, names_by_id(module)):
            rule_of(kind, group.settings, self.decoupled_decay)
        self._groups = len(optimizer.param_groups)
        checked: torch.optim.Optimizer = optimizer
        return checked

    def rates(self, step: int) -> Sequence[float] | None:
        """See `Recipe.rates`; raises as `_of_groups`."""
        return self._of_groups("rates", step)

    def decays(self, step: int) -> Sequence[float] | None:
        """See `Recipe.decays`; raises as `_of_groups`."""
        return self._of_groups("decays", step)

    def _of_groups(self, what: str, step: int) -> Sequence[float] | None:
        """Rates or decays of a step.

        Raises:
            CircuitError: they are not one number for each group; or there are none, and the recipe
                says some: those of the step before would stay, which no checkpoint holds.
        """
        with _told(self.code, f"{what}()"):
            values = getattr(self.of, what)(step)
        if not self._says(what):
            return None
        try:
            numbers = [float(value) for value in values]
        except (TypeError, ValueError):  # a number alone, None, or what is no number
            numbers = []
        sound = numbers and all(0 <= one < float("inf") for one in numbers)
        if not sound or self._groups not in (None, len(numbers)):
            of = "" if self._groups is None else f" of the {self._groups}"
            raise CircuitError(
                f"{what}({step}) gives {numbers or values!r}",
                where=self.code,
                expected=f"a list with one number for each{of} parameter groups of the optimizer,"
                f" at every step, or no {what}() at all",
            )
        return numbers

    def _says(self, what: str) -> bool:
        """Whether the recipe defines a method that it need not."""
        return getattr(type(self.of), what) is not getattr(Recipe, what)

    def accuracy(self, outputs: Tensor, batch: Batch) -> float | None:
        """See `Recipe.accuracy`."""
        with _told(self.code, "accuracy()"):
            value = self.of.accuracy(outputs, batch)
            return None if value is None else float(value)

    @contextmanager
    def watched(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, step: int
    ) -> Iterator[None]:
        """Refuse a step that changes what no checkpoint holds: buffers, settings of groups.

        Raises:
            CircuitError: names it; or the step fails.
        """
        module.train()
        buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
        settings = self._settings(module, optimizer)
        with _told(self.code, f"step {step}"):
            yield
        for name, buffer in module.named_buffers():
            if name not in buffers or not identical(buffers[name], buffer):
                raise CircuitError(
                    f"step {step} has changed the buffer {name}, which no checkpoint holds",
                    where=self.code,
                    expected="a module whose parameters alone change",
                    fix="use a layer without running statistics, or record the loop with"
                    " circuit.watch, which keeps buffers",
                )
        for before, after in zip(settings, self._settings(module, optimizer), strict=True):
            for key in after:
                if before.get(key) != after[key]:
                    raise CircuitError(
                        f"step {step} has changed '{key}' of a parameter group, which no checkpoint"
                        " holds",
                        where=self.code,
                        expected="an optimizer whose groups stay as they are; rates() and decays()"
                        " set theirs",
                    )

    def _settings(
        self, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> list[Mapping[str, Any]]:
        """Of all groups, but for the rates and decays that the recipe itself sets."""
        groups = groups_of(optimizer, names_by_id(module))
        sets = [key for what, key in _SETS.items() if self._says(what)]
        return [{k: v for k, v in group.settings.items() if k not in sets} for group in groups]


_SETS = {"rates": "lr", "decays": "weight_decay"}
"""Methods of a recipe, and the setting of groups that they give."""


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers: what a checkpoint holds of a module, and what it does not."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
