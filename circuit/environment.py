"""What decides the bits of a run besides its config: recorded, compared, and set in one place.

docs/exactness.md lists which of these facts change bits. torch is imported inside the functions,
so that the command line can read this module without it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from circuit import __version__
from circuit.documents import Document, validated
from circuit.errors import CircuitError
from circuit.reading import MissingFileError, read_json
from circuit.sealed import unsealed

Facts = dict[str, Any]
"""Recorded facts, all JSON."""

_VARIABLES = ("ATEN_", "MKL_", "ONEDNN_", "DNNL_", "OMP_", "CUBLAS_")

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")
"""The values with which cuBLAS is deterministic, of which torch accepts no other."""

BIT_FACTS = (
    "torch",
    "torch_build",
    "transformer_lens",
    "cpu_model",
    "cpu_capability",
    "device",
    "device_name",
    "threads",
    "float32_matmul_precision",
    "onednn",
    "deterministic",
    "variables",
)
"""Facts that, when they differ, can change the bits of a step."""

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def prepare_process(*, threads: int | None = None, device: str = "cpu") -> int:
    """Make this process deterministic, with a fixed number of intra-op threads.

    Also tells glibc's allocator to keep freed activations instead of returning them to the kernel,
    which changes no bits and saves page faults (docs/performance.md).

    Args:
        threads: None keeps torch's number.
        device: see `require_device`.

    Returns:
        The number of threads in use.

    Raises:
        CircuitError: as `require_device`; or Python has no docstrings.
    """
    if sys.flags.optimize > 1:
        raise CircuitError(
            "Python runs without docstrings (-OO), of which TransformerLens's libraries make code",
            where="PYTHONOPTIMIZE",
            expected="0 or 1",
            fix="unset it, or leave -OO out",
        )
    import torch

    require_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    # the flag of use_deterministic_algorithms(True), which would also import the compiler (seconds)
    torch.set_deterministic_debug_mode("error")
    # Nothing here reads memory that it has not written; filling it first only costs time.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    _keep_freed_memory()
    return torch.get_num_threads()


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere nothing)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _keep_freed_memory() -> None:
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # a libc other than glibc
        return
    for option, value in (
        (_M_MMAP_THRESHOLD, 32 * 2**20 - 4096),
        (_M_TRIM_THRESHOLD, 2**31 - 1),
        (_M_TOP_PAD, 64 * 2**20),
        (_M_ARENA_MAX, 1),
    ):
        mallopt(option, value)


def require_device(device: str) -> None:
    """Refuse a device that is not here; make cuBLAS deterministic before its first call.

    cuBLAS and torch read `CUBLAS_WORKSPACE_CONFIG` once, at a process's first matrix product on
    `cuda`; it is set here if it is not.

    Raises:
        CircuitError: names the device and those that are available; or the variable has a value
            with which products are not deterministic.
    """
    import torch

    available = ["cpu"]
    if torch.cuda.is_available():
        available.append("cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    if device not in available:
        raise CircuitError(
            f"device '{device}' is not available here",
            expected=f"one of {', '.join(available)}",
            fix="set `device`, CIRCUIT_DEVICE or the config's device",
        )
    if device == "cuda":
        workspace = os.environ.setdefault(CUBLAS_WORKSPACE, _WORKSPACES[0])
        if workspace not in _WORKSPACES:
            raise CircuitError(
                f"{CUBLAS_WORKSPACE} is '{workspace}', with which products on cuda are not"
                " deterministic",
                expected=" or ".join(_WORKSPACES),
                fix="set it so, or unset it",
            )


def environment_facts(device: str = "cpu") -> Facts:
    """Everything about this process that can change bits, and the versions for the record."""
    import torch

    cpu_model, cpu_flags = _cpu()
    return {
        "torch": torch.__version__,
        "torch_build": torch.__config__.show(),
        "transformer_lens": _version("transformer_lens"),
        "numpy": _version("numpy"),
        "circuit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_model": cpu_model,
        "cpu_flags": cpu_flags,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "onednn": torch.backends.mkldnn.enabled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention": "explicit scores and softmax",
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
        },
    }


def _version(distribution: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:  # the core does without TransformerLens
        return None


class RecordedFacts(Document):
    """What a run or trace wrote down; versions differ in what else they did."""

    model_config = ConfigDict(extra="allow")

    torch: str | None = None
    torch_build: str | None = None
    transformer_lens: str | None = None
    circuit: str | None = None
    cpu_model: str | None = None
    cpu_capability: str | None = None
    device: str | None = None
    device_name: str | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    float32_matmul_precision: str | None = None
    onednn: bool | None = None
    deterministic: bool | None = None
    variables: dict[str, str] | None = None


def recorded_facts(path: Path) -> Facts:
    """The facts that a run or trace wrote down; empty if there is no such file.

    Raises:
        CircuitError: the file is damaged, or was changed.
    """
    try:
        facts = read_json(path)
    except MissingFileError:
        return {}
    if isinstance(facts, dict):
        fix = "bring it back; or remove it, and pass `allow_drift`"
        facts = unsealed(facts, where=path, fix=fix)
    return validated(facts, RecordedFacts, where=path).model_dump(exclude_unset=True)


def changed_facts(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The bit-changing facts that differ, each as `name: recorded -> now`."""
    return [
        f"{name}: {recorded.get(name)!r} -> {now.get(name)!r}"
        for name in BIT_FACTS
        if recorded.get(name) != now.get(name)
    ]


def _cpu() -> tuple[str, list[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    split = (line.partition(":") for line in lines)
    fields = {key.strip(): value.strip() for key, _, value in split if value}
    return fields.get("model name", platform.machine()), fields.get("flags", "").split()
