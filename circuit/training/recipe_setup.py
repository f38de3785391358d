"""What the config of a recipe names: its file, which is executed once, and no task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from circuit.core.module import for_evaluation
from circuit.lazy import torch
from circuit.model.weights import load_tensors
from circuit.train_config import RecipeConfig, TrainConfig
from circuit.training.checkpoints import TrainState
from circuit.training.setup import Setup

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from circuit.training.recipe import Recipe


class RecipeSetup(Setup):
    """A recipe's config with what it names. The module may be any; types say where it is one."""

    config: RecipeConfig

    def __init__(
        self,
        config: RecipeConfig,
        near: str | Path | None = None,
        *,
        benchmark_digest: str | None = None,
    ) -> None:
        """Execute nothing yet; for the arguments see `Setup`."""
        super().__init__(config, near, benchmark_digest=benchmark_digest)
        # in a container, so that a copy with another config shares what is loaded later
        self._recipe: list[Recipe] = []

    def with_config(self, config: TrainConfig) -> RecipeSetup:
        """See `Setup.with_config`; the code that was named here is named there."""
        assert isinstance(config, RecipeConfig), "it is of the same recipe"
        copied = super().with_config(config.executing(config.code or self.config.code))
        assert isinstance(copied, RecipeSetup)
        if config.device != self.config.device:
            copied._recipe = []
        return copied

    @property
    def digest(self) -> str:
        """Of the recipe's file."""
        return self.config.recipe.sha256

    def _run_recipe(self) -> Recipe:
        """As it was loaded.

        Raises:
            CircuitError: nobody has named the file here, or it cannot be used.
        """
        if not self._recipe:
            from circuit.training.own_recipe import load_recipe

            self._recipe.append(load_recipe(self.config))
        return self._recipe[0]

    def check_steps(self) -> None:
        """See `Setup.check_steps`; raises as `check_code`."""
        from circuit.training.own_recipe import check_code

        check_code(self.config)

    def require_task(self) -> None:
        """Refuse it."""
        raise self.config.refusal("task")

    def initial_model(self) -> HookedTransformer:
        """See `Setup.initial_model`."""
        return cast("HookedTransformer", self.recipe().module())

    def module(self, dtype: torch.dtype | None = None) -> HookedTransformer:
        """See `Setup.module`."""
        return cast("HookedTransformer", for_evaluation(self.initial_model(), dtype))

    def model(self, state: TrainState, *, untied: bool = False) -> HookedTransformer:
        """See `Setup.model`; how its output is tied nobody knows."""
        self.check(state)
        model = self.module()
        load_tensors(model, state.parameters)
        return model

    def require_training_memory(self, *, traced: bool = False) -> None:
        """What a module of somebody's own takes is not known."""

    def saved_bytes(self) -> int:
        """A checkpoint, about: with two moments of every parameter."""
        tensors = list(self.recipe().module().parameters())
        return sum(3 * (t.numel() * t.element_size() + 400) for t in tensors) + 2000


def setup_of(
    config: TrainConfig, near: str | Path | None = None, *, benchmark_digest: str | None = None
) -> Setup:
    """The setup of any config; for the arguments see `Setup`."""
    if isinstance(config, RecipeConfig):
        return RecipeSetup(config, near, benchmark_digest=benchmark_digest)
    return Setup(config, near, benchmark_digest=benchmark_digest)
