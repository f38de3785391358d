"""The optimizer (torch's own) and the learning-rate schedule.

Optimizer state is handled by parameter name: `{"exp_avg": {name: tensor}, ...}`, never by torch's
integer positions, so that a state of the wrong order, shape or content is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from circuit.core.optimizers import Past, names_by_id, past_of, remember
from circuit.core.state import Moments
from circuit.core.update import AdamWRule, DifferentiableRule, SGDRule
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.train_config import AdamWConfig, SGDConfig, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor, nn


def build_optimizer(model: nn.Module, config: AdamWConfig | SGDConfig) -> torch.optim.Optimizer:
    """torch's AdamW or SGD over all parameters, in one group, in the model's order."""
    parameters = list(model.parameters())
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            foreach=False,
        )
    return torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        foreach=False,
    )


def update_rule(config: AdamWConfig | SGDConfig) -> DifferentiableRule:
    """What splits an update of this optimizer into its terms."""
    if isinstance(config, AdamWConfig):
        return AdamWRule(config.beta1, config.beta2, config.eps)
    return SGDRule(config.momentum)


def learning_rate(config: TrainConfig, step: int) -> float:
    """`lr_t` of step `t` (from 1): linear warm-up `lr * t / warmup`, then the schedule.

    Cosine and linear fall from the base rate at the end of the warm-up to `floor` times the base
    rate at the run's last step (definitions.md section 4).
    """
    base = config.optimizer.learning_rate
    schedule = config.schedule
    if step <= schedule.warmup_steps:
        return base * step / schedule.warmup_steps
    if schedule.name == "constant":
        return base
    span = max(config.steps - schedule.warmup_steps, 1)
    progress = min((step - schedule.warmup_steps) / span, 1.0)
    shape = 1 - progress if schedule.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return base * (schedule.floor + (1 - schedule.floor) * shape)


def moment_names(config: AdamWConfig | SGDConfig) -> tuple[str, ...]:
    """Names of the tensors that the optimizer keeps for each parameter."""
    if isinstance(config, AdamWConfig):
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.momentum else ()


def read_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: AdamWConfig | SGDConfig
) -> Moments:
    """The optimizer's state by name; zeros before the first step (as torch starts from)."""
    named = list(model.named_parameters())

    def read(moment: str, parameter: nn.Parameter) -> Tensor:
        found = optimizer.state[parameter].get(moment)
        return torch.zeros_like(parameter).detach() if found is None else found.detach()

    return {
        moment: {name: read(moment, parameter) for name, parameter in named}
        for moment in moment_names(config)
    }


def write_moments(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: AdamWConfig | SGDConfig,
    moments: Mapping[str, Mapping[str, Tensor]],
    step: int,
) -> None:
    """Put a state that was read after `step` steps into a fresh optimizer.

    Raises:
        CircuitError: a moment is missing or unknown, or a tensor's name, shape or dtype is not its
            parameter's, or a second moment is negative.
    """
    check_moments(model, config, moments)
    optimizer.state.clear()
    if step == 0:
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            state = {
                moment: values[name].to(parameter.device).clone()
                for moment, values in moments.items()
            }
            if isinstance(config, AdamWConfig):
                # torch keeps the count on the CPU, wherever the parameters are
                state["step"] = torch.tensor(float(step), dtype=torch.float32)
            optimizer.state[parameter] = state


NUMBER = " (number)"
"""Behind the name of what an optimizer remembers as a number, which is stored as a tensor."""


def read_memory(module: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
    """All that any optimizer remembers, by its own names; nothing before the first step.

    Raises:
        CircuitError: it remembers what is neither tensor nor number.
    """
    memory: Moments = {}
    for name, remembered in past_of(optimizer, names_by_id(module)).items():
        for key, value in remembered.items():
            if isinstance(value, torch.Tensor):
                memory.setdefault(key, {})[name] = value
            elif isinstance(value, bool | int | float):
                dtype = torch.float64 if isinstance(value, float) else None  # of its own type
                memory.setdefault(key + NUMBER, {})[name] = torch.tensor(value, dtype=dtype)
            elif value is not None:  # as torch does where a setting leaves a tensor out
                raise CircuitError(
                    f"{type(optimizer).__name__} remembers {key} of {name}, a"
                    f" {type(value).__name__}",
                    expected="tensors and numbers, which a checkpoint can hold",
                )
    return memory


def write_memory(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    memory: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Put what `read_memory` gave into a fresh optimizer of the same kind.

    Raises:
        CircuitError: a name is none of a parameter that the optimizer moves.
    """
    parameters = dict(module.named_parameters())
    past: Past = {name: {} for name in past_of(optimizer, names_by_id(module))}
    for key, tensors in memory.items():
        for name, tensor in tensors.items():
            if name not in past:
                raise CircuitError(f"{key} of {name}: the optimizer moves no such parameter")
            number = key.endswith(NUMBER)
            past[name][key.removesuffix(NUMBER)] = tensor.item() if number else tensor
    remember(optimizer, parameters, past)


def check_moments(
    model: nn.Module,
    config: AdamWConfig | SGDConfig,
    moments: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Refuse a state that is not this model's and this optimizer's (see `write_moments`)."""
    expected = moment_names(config)
    if tuple(moments) != expected:
        raise CircuitError(
            f"optimizer state holds {list(moments)}", expected=f"{list(expected)} ({config.name})"
        )
    names = [name for name, _ in model.named_parameters()]
    for moment, values in moments.items():
        if list(values) != names:
            odd = sorted(set(values) ^ set(names)) or ["their order"]
            raise CircuitError(f"{moment}: parameter names do not match the model's: {odd[0]}")
        for name, parameter in model.named_parameters():
            value = values[name]
            if value.shape != parameter.shape or value.dtype != parameter.dtype:
                raise CircuitError(
                    f"{moment} of {name} is {value.dtype} {list(value.shape)}",
                    expected=f"{parameter.dtype} {list(parameter.shape)}",
                )
            if moment == "exp_avg_sq" and (value < 0).any():
                raise CircuitError(f"{moment} of {name} holds negative values")
