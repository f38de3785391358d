"""Heavy libraries, imported when they are first used.

`from circuit.lazy import torch` names torch and loads nothing; the first attribute that is asked
for imports it. So a command refuses what arguments, configs and headers already tell before it
waits for torch, and one that needs no torch never loads it. Names that only annotations need are
imported under `TYPE_CHECKING`. TransformerLens has no place here: `circuit.model.build` alone
imports it, and is itself imported where a model is constructed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar


@contextmanager
def uncollected() -> Iterator[None]:
    """Around imports, of which nothing is garbage: nobody searches it again and again."""
    searched = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searched:
            gc.enable()


class LazyModule(ModuleType):
    """Stands for a module, and for parts of it that it does not import itself, until it is used."""

    def __init__(self, name: str, *parts: str) -> None:
        super().__init__(name)
        self._parts = parts
        self._module: ModuleType | None = None

    def __getattr__(self, name: str) -> Any:
        """An attribute of the module, which is imported now at the latest; kept, for speed."""
        if self._module is None:
            with uncollected():
                for part in self._parts:
                    import_module(f"{self.__name__}.{part}")
                self._module = import_module(self.__name__)
        attribute = getattr(self._module, name)
        setattr(self, name, attribute)
        return attribute


if TYPE_CHECKING:
    import altair as alt
    import numpy as np
    import pandas as pd
    import torch
else:
    alt = LazyModule("altair")
    np = LazyModule("numpy")
    pd = LazyModule("pandas")
    torch = LazyModule("torch")

__all__ = ["LazyModule", "alt", "no_grad", "np", "pd", "torch"]

P = ParamSpec("P")
T = TypeVar("T")


def no_grad(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.no_grad()` around a function or a generator, without torch where it is defined."""

    @wraps(function)
    def without_gradients(*args: P.args, **kwargs: P.kwargs) -> T:
        return torch.no_grad()(function)(*args, **kwargs)

    return without_gradients
