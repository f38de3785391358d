"""What a command would need in memory and on disk, and what there is, before anything is allocated.

The estimates count the bytes of what grows with a setting: weights, gradients, moments, the states
that are copied to be saved, activations of one batch, records, and the files of a run or trace.
They leave out the interpreter and its libraries (about 0.6 GB with TransformerLens), what the
allocator keeps, and what a report makes of the activations of a pass. Nothing is refused because it
takes long.

What there is: the machine's memory, or less where a container or `ulimit -v` says so (whatever else
is running), and the free space of the file system. `CIRCUIT_MEMORY` and `CIRCUIT_DISK`, such as
`64GB`, count instead where they are set.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from circuit.errors import CircuitError

if TYPE_CHECKING:
    from circuit.train_config import ModelConfig, TrainConfig

Need = Mapping[str, int]
"""Bytes by what takes them; the words name the settings that decide them."""

MEMORY, DISK = "CIRCUIT_MEMORY", "CIRCUIT_DISK"

_FLOAT = 4
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_CGROUP = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


# --- what there is --------------------------------------------------------------------------------


def memory_limit() -> int:
    """Bytes of memory that this process may take."""
    setting = _setting(MEMORY)
    if setting is not None:
        return setting
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    for path in _CGROUP:
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # no such file, or `max`
            continue
    return min(limits)


def disk_limit(folder: Path) -> int:
    """Bytes that can be written below a folder, which need not exist yet."""
    setting = _setting(DISK)
    if setting is not None:
        return setting
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    return shutil.disk_usage(existing).free


def _setting(name: str) -> int | None:
    text = os.environ.get(name, "")
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,3})?) ?([KMGT]?)B?", text, re.IGNORECASE | re.ASCII)
    if match is None:
        raise CircuitError(f"'{text}' is no size", where=name, expected="one such as 64GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def shown(size: int) -> str:
    """A number of bytes to read: `1.2 GB`."""
    exponent = min(max(len(str(size)) - 1, 0) // 3, 6)
    unit = ("bytes", "kB", "MB", "GB", "TB", "PB", "EB")[exponent]
    return f"{size} bytes" if exponent == 0 else f"{size / 1000**exponent:.3g} {unit}"


def require_memory(need: Need, *, where: object = None) -> None:
    """Refuse what the memory cannot hold.

    Raises:
        CircuitError: says what it would need, and for what most; what there is; what to do.
    """
    _require(need, memory_limit(), "memory", MEMORY, where)


def require_disk(need: Need, folder: Path, *, freed: int = 0, where: object = None) -> None:
    """Refuse what the file system of a folder cannot hold.

    Args:
        need: bytes that are going to be written.
        folder: where to.
        freed: bytes of the files that are replaced.
        where: setting or config that asks for it.

    Raises:
        CircuitError: as `require_memory`.
    """
    _require(need, disk_limit(folder) + freed, f"disk below {folder}", DISK, where)


def _require(need: Need, limit: int, what: str, variable: str, where: object) -> None:
    total = sum(need.values())
    if total <= limit:
        return
    largest = max(need, key=lambda name: need[name])
    raise CircuitError(
        f"would need {shown(total)} of {what}, {shown(need[largest])} of it for {largest}",
        where=where,
        expected=f"at most {shown(limit)}, which there is",
        fix=f"lower what it names, or say in {variable} how much may be taken",
    )


# --- what is needed -------------------------------------------------------------------------------


def count_parameters(model: ModelConfig, vocabulary: int) -> int:
    """Numbers in a model's parameters."""
    d, f = model.d_model, model.d_ff
    biased = int(model.biases)
    block = 4 * d * d + 2 * d * f + biased * (4 * d + (f + d if f else 0))
    norms = 1 + model.layers * (2 if f else 1) if model.normalization == "layer_norm" else 0
    unembedding = 0 if model.tied_unembedding else vocabulary * (d + biased)
    embeddings = (vocabulary + model.max_sequence_length) * d
    return embeddings + model.layers * block + norms * d * (1 + biased) + unembedding


def weights_memory(model: ModelConfig, vocabulary: int) -> dict[str, int]:
    """A model and the copy that further ones are made from."""
    return {_WEIGHTS: 2 * _FLOAT * count_parameters(model, vocabulary)}


_WEIGHTS = "weights (model.layers, d_model, d_ff, max_sequence_length)"


def count_moments(config: TrainConfig) -> int:
    """Tensors that the optimizer keeps for each parameter."""
    if config.optimizer.name == "adamw":
        return 2
    return 1 if config.optimizer.momentum else 0


def state_bytes(config: TrainConfig, vocabulary: int) -> int:
    """A state's weights and moments."""
    return _FLOAT * count_parameters(config.model, vocabulary) * (1 + count_moments(config))


def activation_bytes(config: TrainConfig, vocabulary: int, length: int) -> int:
    """What the backward pass of one batch reads.

    Of every block and token: the residual stream before and between its parts, what LayerNorm makes
    of both, queries, keys, values and the heads' sum (8 times `d_model`), the MLP before and after
    its nonlinearity, and a row of every head's pattern; of TransformerLens's own kernels twice as
    much. Behind the blocks logits, their log-probabilities and the gradients of both.

    Args:
        vocabulary: number of tokens.
        length: positions that the model reads.
    """
    model, tokens = config.model, config.batch_size * length
    block = 8 * model.d_model + 2 * model.d_ff + model.heads * length
    kernels = 1 if config.kernels == "fast" else 2
    return _FLOAT * tokens * (kernels * model.layers * block + 4 * vocabulary + 2 * model.d_model)


def reading_memory(
    model: ModelConfig, vocabulary: int, length: int, rows: int, *, kept: int = 0
) -> dict[str, int]:
    """A model that reads some records at once and learns nothing, at the least.

    Of every token the patterns that are kept and, at the widest place, what is in one block
    (the residual stream, its normal form, and queries, keys, values or the MLP's) or logits and
    their log-probabilities.

    Args:
        vocabulary: number of tokens.
        length: positions that the model reads.
        rows: records at once.
        kept: layers whose attention patterns are kept.
    """
    heads = model.heads * length
    block = 2 * model.d_model + max(3 * model.d_model + heads, 2 * model.d_ff)
    token = kept * heads + max(block, 3 * vocabulary)
    reading = f"{rows} records (model.layers, heads, d_ff, d_model, or fewer or shorter records)"
    return {**weights_memory(model, vocabulary), reading: _FLOAT * rows * length * token}


def training_memory(
    config: TrainConfig, vocabulary: int, length: int, *, traced: bool = False
) -> dict[str, int]:
    """A run in memory, while it takes a step or saves a state.

    Args:
        vocabulary: number of tokens.
        length: of the longest training record.
        traced: with the flat vectors of a traced step and its terms, which are float64.
    """
    size, state = count_parameters(config.model, vocabulary), state_bytes(config, vocabulary)
    vectors = 2 * state + 10 * 2 * _FLOAT * size if traced else 0
    return {
        # beside the state that is saved stand its copy, its bytes and the file's
        _WEIGHTS: 2 * _FLOAT * size + 4 * state + vectors,
        "a batch (batch_size, model.d_ff, d_model, layers)": activation_bytes(
            config, vocabulary, length
        )
        + 24 * config.batch_size * (length + 1),
        "the names of its checkpoints (steps, checkpoint_every)": 200
        * (config.steps // config.checkpoint_every),
    }


ROW, EVALUATION_ROW = 250, 2500
"""Bytes of a row of `metrics.jsonl`: of a step, of a split's evaluation."""


def saved_bytes(config: TrainConfig, vocabulary: int) -> int:
    """A checkpoint of a run of a task."""
    # the description beside a state's payload has a few hundred bytes a tensor
    tensors = (3 + 16 * config.model.layers) * (1 + count_moments(config))
    return state_bytes(config, vocabulary) + 400 * tensors + 2000


def training_disk(config: TrainConfig, saved: int, *, done: int = 0) -> dict[str, int]:
    """The files that a run is going to write from step `done` on.

    Args:
        saved: bytes of a checkpoint.
    """

    def times(every: int) -> int:
        return max(config.steps // every - done // every, 0) + 1

    rows = ROW * times(config.log_every)
    if config.tracked_splits:
        rows += EVALUATION_ROW * len(config.tracked_splits) * times(config.eval_every)
    return {
        "checkpoints (steps, checkpoint_every)": (1 + times(config.checkpoint_every)) * saved,
        "metrics (steps, log_every, eval_every)": rows,
    }


def trace_disk(saved: int, batch: int, *, steps: int, stored: int, listed: int) -> dict[str, int]:
    """The files of a trace.

    Args:
        saved: bytes of a checkpoint.
        batch: examples in it.
        steps: recorded, one row each.
        stored: states.
        listed: parameters in every row.
    """
    return {
        "anchors (anchor_every, checkpoint_every, storage)": stored * saved,
        "rows (steps, batch_size, top_k_parameters)": steps * (1400 + 7 * batch + 120 * listed),
    }


def recording_disk(
    keep: str, size: int, moments: int, *, steps: int, every: int, anchor_every: int
) -> dict[str, int]:
    """The files of a recording (`circuit.watch`).

    Args:
        keep: what is stored of the steps: gradients, states, or rows alone.
        size: bytes of the parameters.
        moments: bytes of what the optimizers remember of them.
        steps: recorded.
        every, anchor_every: steps between stored states, where states alone are stored; where
            gradients are.
    """
    gradients = keep == "gradients"
    states = 0 if keep == "rows" else 1 + steps // (anchor_every if gradients else every)
    return {
        "gradients (keep)": (size + 1500) * steps if gradients else 0,
        "states (keep, every, anchor_every)": (size + moments) * states,
        "rows (every)": 2000 * (steps // every),
    }
