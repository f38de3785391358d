"""Families of scalars: found by name, each with options of its own, and anybody's.

A family is a module of this package that declares a class, named like neither, of options that
make scalars; there is no list of them to keep:

    class Loss(ScalarFamily):
        scope: Annotated[Literal["full_lm", "answer"], Option("Which tokens.")] = "full_lm"

        def build(self, inputs):
            return [LossScalar(inputs.batch, self.scope)]

On a command line a family is one word, `loss,scope=answer`: the module's name, and its options by
the names of their flags; a key that stands several times has several values. Where the name is
`module:name` or `FILE.py:name`, the module is anybody's that can be imported from the current
folder, and the name is a family's class, or a function or class that is called with the inputs
first and the word's keys as keywords, and gives a scalar or several; one whose first parameter is
called `module` or `model` is itself the scalar, a number of the module:

    def copying(inputs: Inputs, layer: int, head: int = 0) -> Scalar: ...
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast, get_origin

from pydantic import TypeAdapter, ValidationError

from circuit.errors import CircuitError, told
from circuit.options import Options
from circuit.plugins import import_named_file, is_file_name, let_import_from, nearest
from circuit.reading import file_digest
from circuit.scalars.base import Measured
from circuit.tasks.base import Task
from circuit.train_config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from circuit.reports.inputs import Inputs
    from circuit.runs.base import Replayable
    from circuit.scalars.base import Scalar


class ScalarFamily(Options):
    """Options that make scalars; picklable, for every process of an attribution makes its own.

    Attributes:
        any_module: whether they read logits alone, which modules of any class have.
    """

    any_module: ClassVar[bool] = False

    def measure(self) -> Scalar:
        """Refuse to be a scalar of a run that has no task; see `OwnScalars.measure`."""
        name = type(self).__module__.rpartition(".")[2]
        raise CircuitError(
            f"scalar {name} reads records of a task, and a run of a recipe has none",
            where="`scalars`",
            expected="module:name, a function of the run's module that gives numbers",
        )

    def check_run(self, run: Replayable) -> None:
        """Refuse what the steps of a trace do not have.

        Raises:
            CircuitError: names it.
        """

    def build(self, inputs: Inputs) -> Sequence[Scalar]:
        """The scalars, the same ones whenever it is called.

        Args:
            inputs: of the report: probe records, pairs, and the trace's states.

        Raises:
            CircuitError: the records or the model do not have what is asked for.
        """
        raise NotImplementedError

    def provenance(self, inputs: Inputs) -> dict[str, Any]:
        """Facts for the report; what ends in `_digest` or `_sha256` has to be equal in shards."""
        return {}


Given: TypeAlias = "Mapping[str, Sequence[str]]"
"""The values of each key of a word."""


def family_names() -> list[str]:
    """Every family's name."""
    package = import_module("circuit.scalars")
    names = [module.name for module in iter_modules(package.__path__)]
    return [name for name in names if find_family(name) is not None]


def find_family(name: str) -> type[ScalarFamily] | None:
    """A family by its name, that of its module; None where there is none."""
    module = f"circuit.scalars.{name}"
    if not name.isidentifier() or find_spec(module) is None:
        return None
    classes = [one for one in vars(import_module(module)).values() if inspect.isclass(one)]
    families = [one for one in classes if issubclass(one, ScalarFamily) and one != ScalarFamily]
    return next((one for one in families if one.__module__ == module), None)


def keys_of(family: type[ScalarFamily]) -> dict[str, str]:
    """The fields of a family by the keys of its words, which are called like the flags."""
    flags = family.flags().items()
    return {flag.removeprefix("--").replace("-", "_"): name for name, flag in flags}


def parse_scalars(word: str) -> ScalarFamily | OwnScalars:
    """What a word says; a module of one's own is not imported yet.

    Raises:
        CircuitError: there is no such family or key, or a value is none.
    """
    name, texts = split_word(word)
    if ":" in name:
        return OwnScalars(name, texts)
    family = find_family(name)
    if family is None:
        expected = f"one of {', '.join(family_names())}, or FILE.py:NAME (module:name) of your own"
        raise CircuitError(f"unknown scalar '{name}'", expected=expected)
    return _with_options(family, name, texts)


def split_word(word: str) -> tuple[str, dict[str, tuple[str, ...]]]:
    """Name and values by key.

    Raises:
        CircuitError: a part is no `key=value`.
    """
    name, *parts = (part.strip() for part in word.split(","))
    texts: dict[str, tuple[str, ...]] = {}
    for part in parts:
        key, equals, value = (text.strip() for text in part.partition("="))
        if not key or not equals or not value:
            raise CircuitError(f"'{part}' in '{word}'", expected="key=value")
        texts[key] = (*texts.get(key, ()), value)
    return name, texts


def _with_options(family: type[ScalarFamily], name: str, given: Given) -> ScalarFamily:
    keys = keys_of(family)
    for key in given:
        if key not in keys:
            raise CircuitError(f"{name} has no '{key}'", expected=f"one of {', '.join(keys)}")
    values = {
        keys[key]: _value(name, key, texts, family.model_fields[keys[key]].annotation)
        for key, texts in given.items()
    }
    try:
        return family(**values)
    except CircuitError as error:
        raise _of_the_word(error, name, {field: key for key, field in keys.items()}) from None


def _of_the_word(error: CircuitError, name: str, keys: Mapping[str, str]) -> CircuitError:
    """A refusal of a family's options in the words that were typed."""

    def typed(text: str | None) -> str | None:
        if text is None:
            return None
        return re.sub(r"`(\w+)`", lambda match: keys.get(match[1], match[1]), text)

    where = f"{name}, {typed(error.where)}" if error.where else name
    return CircuitError(
        typed(error.what) or "", where=where, expected=typed(error.expected), fix=typed(error.fix)
    )


def _value(name: str, key: str, texts: Sequence[str], annotation: Any) -> Any:
    """What pydantic reads as the type: one text, or several for a tuple or list."""
    if get_origin(annotation) in (tuple, list) or annotation in (tuple, list):
        return list(texts)
    if len(texts) > 1:
        raise CircuitError(f"{name} has '{key}' {len(texts)} times", expected="once")
    return texts[0]


@dataclass(frozen=True)
class OwnScalars:
    """Scalars of somebody's own module, with the members of a `ScalarFamily`.

    Attributes:
        name: `module:name`.
        given: texts by keyword.
    """

    name: str
    given: Given = field(default_factory=dict)
    any_module: ClassVar[bool] = True
    """Whatever it reads, it says by itself."""

    def check_model(self, shape: ModelConfig) -> None:
        """Import the module; refuse what the model does not have if it gives a family.

        Raises:
            CircuitError: it cannot be imported, has no such name, or does not take a key.
        """
        target = self._target()
        if isinstance(target, ScalarFamily):
            target.check_model(shape)

    def check_run(self, run: Replayable) -> None:
        """As the family's, if it is one."""
        target = self._target()
        if isinstance(target, ScalarFamily):
            target.check_run(run)

    def check_task(self, task: Task) -> None:
        """As the family's, if it is one."""
        target = self._target()
        if isinstance(target, ScalarFamily):
            target.check_task(task)

    def build(self, inputs: Inputs) -> list[Scalar]:
        """Call it.

        Raises:
            CircuitError: it fails, or what it gives are no scalars.
        """
        target = self._target()
        if self._is_number():
            return [self.measure()]
        expected = "a scalar or several (docs/scalars.md)"
        try:
            built = target.build(inputs) if isinstance(target, ScalarFamily) else target(inputs)
            one = hasattr(built, "bind") or not isinstance(built, Iterable)
            scalars: list[Any] = [built] if one else list(built)
        except (CircuitError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise CircuitError(
                f"raised {told(error)}", where=self.name, expected=expected, fix=self._fix()
            ) from error
        if not scalars:
            raise CircuitError("gave no scalar", where=self.name, expected=expected)
        for scalar in scalars:
            missing = [name for name in ("name", "needs", "bind") if not hasattr(scalar, name)]
            if missing:
                what = f"gave {scalar!r}, which has no {missing[0]}"
                raise CircuitError(what, where=self.name, expected=expected, fix=self._fix())
        return scalars

    def _fix(self) -> str | None:
        """What to do if it was meant as a number of the module, which its parameter has to say."""
        target = self._named()
        first = None if inspect.isclass(target) else _parameters(target)[0].name
        if first in (None, "inputs"):
            return None
        return f"name the first parameter module, not {first}, if it is a function of the module"

    def _is_number(self) -> bool:
        """Whether the name is that of a number of the module, by its first parameter."""
        target = self._named()
        if not callable(target) or inspect.isclass(target):
            return False
        return [one.name for one in _parameters(target)][:1] in (["module"], ["model"])

    def measure(self) -> Scalar:
        """The scalar of a run that has no task: the name is a function of the run's module.

        Raises:
            CircuitError: it cannot be imported, is a family's class, or does not take a key.
        """
        target = self._target()
        if isinstance(target, ScalarFamily):
            raise CircuitError(
                "makes scalars of a task's records, and the run has none",
                where=self.name,
                expected="a function of the run's module that gives numbers",
            )

        def numbers(module: nn.Module) -> Tensor:
            try:
                values: Tensor = target(module)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # it is anybody's code
                raise CircuitError(f"raised {told(error)}", where=self.name) from error
            return values

        keys = (f"{key}={one}" for key, several in self.given.items() for one in several)
        return cast("Scalar", Measured(numbers, ".".join([self.name.rpartition(":")[2], *keys])))

    def provenance(self, inputs: Any) -> dict[str, Any]:
        """The module's digest, for its code decides the rows."""
        return {"scalar_module_sha256": file_digest(str(self._module().__file__))}

    def _module(self) -> Any:
        if is_file_name(self.name):
            return import_named_file(self.name.rpartition(":")[0], what="the scalar")
        let_import_from(Path.cwd())
        module = self.name.partition(":")[0]
        try:
            if getattr(imported := import_module(module), "__file__", None) is None:
                raise ImportError("it has no file, whose digest the report would have")
            return imported
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # it is anybody's code
            raise CircuitError(
                f"module '{module}' cannot be imported ({told(error)})",
                where=self.name,
                expected="module:name, importable from the current folder",
            ) from error

    def _named(self) -> Any:
        """What the name names; None where there is nothing."""
        target: Any = self._module()
        for part in self.name.rpartition(":")[2].split("."):
            target = getattr(target, part, None)
        return target

    def _target(self) -> ScalarFamily | Callable[[Any], Any]:
        """The family with its options, or the function with its keywords."""
        target, name = self._named(), self.name.rpartition(":")[2]
        if inspect.isclass(target) and issubclass(target, ScalarFamily):
            return _with_options(target, self.name, self.given)
        if not callable(target):
            missing = target is None
            raise CircuitError(
                f"its module has no '{name}'" if missing else f"is of type {type(target).__name__}",
                where=self.name,
                expected="a function or class, as FILE.py:NAME or module:name",
                fix=nearest(name, self._module()) if missing else None,
            )
        keywords = self._keywords(target)
        return lambda inputs: target(inputs, **keywords)

    def _keywords(self, target: Callable[..., Any]) -> dict[str, Any]:
        """The given texts as the types that the signature says; text where it says none."""
        parameters = _parameters(target)
        if not parameters or parameters[0].kind in _BY_KEYWORD:
            expected = "a function or class that is called with them (docs/scalars.md)"
            raise CircuitError("takes no inputs", where=self.name, expected=expected)
        keywords = parameters[1:]
        types = {one.name: one.annotation for one in keywords}
        values: dict[str, Any] = {}
        for key, texts in self.given.items():
            if key not in types:
                expected = f"one of {', '.join(types)}" if types else "no key"
                raise CircuitError(f"takes no '{key}'", where=self.name, expected=expected)
            plain = types[key] is inspect.Parameter.empty or isinstance(types[key], str)
            kind = str if plain else types[key]
            try:
                value = _value(self.name, key, texts, kind)
                values[key] = TypeAdapter(kind).validate_python(value)
            except ValidationError as error:
                what = error.errors()[0]["msg"].removeprefix("Input should be ")
                raise CircuitError(f"{key}={texts[0]}", where=self.name, expected=what) from None
        for one in keywords:
            if one.default is one.empty and one.name not in values and one.kind not in _VARIADIC:
                raise CircuitError(
                    f"needs '{one.name}'", where=self.name, fix=f"add {one.name}=..."
                )
        return values


def _parameters(target: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(target, eval_str=True).parameters.values())
    except NameError:  # a type is imported for checkers alone: its values stay text
        return list(inspect.signature(target).parameters.values())
    except ValueError:  # of some that are written in C
        return []


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_BY_KEYWORD = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
