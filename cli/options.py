"""Options that several commands share, and the values that shell completion offers for them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from circuit import CircuitError

DEVICES = ("cpu", "cuda", "mps")
DEFAULT_SPLITS = (
    "train",
    "validation_iid",
    "test_iid",
    "heldout_pairs",
    "structural_ood",
    "counterfactual",
)


def complete_config(incomplete: str) -> list[str]:
    """Configs under configs/ and of the runs under artifacts/runs/."""
    found = [*Path("configs").rglob("*.json"), *Path("artifacts/runs").rglob("run_config.json")]
    return sorted(str(path) for path in found if str(path).startswith(incomplete))


def complete_benchmark_config(incomplete: str) -> list[str]:
    """Configs of benchmarks."""
    return [path for path in complete_config(incomplete) if "benchmark" in Path(path).parts]


def complete_train_config(incomplete: str) -> list[str]:
    """Configs of training runs."""
    return [path for path in complete_config(incomplete) if "benchmark" not in Path(path).parts]


def complete_split(ctx: typer.Context, incomplete: str) -> list[str]:
    """Splits of the benchmark that the command line names so far."""
    return [name for name in _known_splits(ctx) if name.startswith(incomplete)]


def _known_splits(ctx: typer.Context) -> list[str]:
    """Splits of the benchmark that the command line names so far, else the usual ones."""
    folder = ctx.params.get("benchmark_dir")
    config = ctx.params.get("config")
    try:
        if folder is None and config is not None:
            folder = json.loads(Path(config).read_text(encoding="utf-8"))["benchmark_dir"]
        if folder is not None:
            text = (Path(folder) / "metadata.json").read_text(encoding="utf-8")
            return list(json.loads(text)["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # half-typed command lines are no error
    return list(DEFAULT_SPLITS)


def complete_checkpoint(ctx: typer.Context, incomplete: str) -> list[str]:
    """Checkpoints of the run whose config the command line names, else of every run."""
    config = ctx.params.get("config")
    folders: list[Path] = list(Path("artifacts/runs").rglob("checkpoints"))
    if config is not None:
        own = Path(config).parent / "checkpoints"
        folders = [own] if own.is_dir() else folders
    found = [str(path) for folder in folders for path in folder.glob("*.pt")]
    return sorted(path for path in found if path.startswith(incomplete))


def complete_trace(incomplete: str) -> list[str]:
    """Folders of traces under artifacts/."""
    found = [str(path.parent) for path in Path("artifacts").rglob("trace.json")]
    return sorted(path for path in found if path.startswith(incomplete))


def complete_probe_set(incomplete: str) -> list[str]:
    """Probe sets under artifacts/."""
    found = [str(path) for path in Path("artifacts").rglob("probe_set*.jsonl")]
    return sorted(path for path in found if path.startswith(incomplete))


def _model_shape(ctx: typer.Context) -> tuple[int, int]:
    """Layers and heads of the config that the command line names so far, else the reference's."""
    try:
        model = json.loads(Path(ctx.params["config"]).read_text(encoding="utf-8"))["model"]
        return int(model["layers"]), int(model["heads"])
    except (OSError, ValueError, KeyError, TypeError):
        return 3, 4


def complete_stage(ctx: typer.Context, incomplete: str) -> list[str]:
    """Stages of the residual stream."""
    layers = range(_model_shape(ctx)[0])
    between = [f"layer_{layer}_post_{part}" for layer in layers for part in ("attn", "mlp")]
    names = ["embedding", *between, "final_norm"]
    return [name for name in names if name.startswith(incomplete)]


def complete_head(ctx: typer.Context, incomplete: str) -> list[str]:
    """Heads by address, such as L2H1."""
    layers, heads = _model_shape(ctx)
    names = [f"L{layer}H{head}" for layer in range(layers) for head in range(heads)]
    return [name for name in names if name.startswith(incomplete)]


def complete_component(ctx: typer.Context, incomplete: str) -> list[str]:
    """Heads and MLPs by address."""
    mlps = [f"L{layer}MLP" for layer in range(_model_shape(ctx)[0])]
    return complete_head(ctx, incomplete) + [name for name in mlps if name.startswith(incomplete)]


def complete_from(*values: str) -> Callable[[str], list[str]]:
    """A completer for a fixed set of values."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


TrainConfigPath = Annotated[
    Path,
    typer.Option("--config", help="Training config (JSON).", autocompletion=complete_train_config),
]
BenchmarkConfigPath = Annotated[
    Path,
    typer.Option(
        "--config", help="Benchmark config (JSON).", autocompletion=complete_benchmark_config
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace the files that an earlier run of this command wrote, no others.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object with every path that was written.")
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda or mps; else CIRCUIT_DEVICE, else the config's.",
        autocompletion=complete_from(*DEVICES),
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Intra-op threads; they decide bits too."),
]
Splits = Annotated[
    list[str] | None,
    typer.Option(
        "--split", help="Split of the benchmark; repeatable.", autocompletion=complete_split
    ),
]
Checkpoint = Annotated[
    Path, typer.Option(help="Checkpoint file.", autocompletion=complete_checkpoint)
]


ROLES = (
    "prediction",
    "query_key",
    "support_op",
    "support_key",
    "support_value",
    "support_write",
    "key_distractors",
    "value_distractors",
    "causal_prefix",
)
SIDES = ("clean", "corrupted")
PAIR_TYPES = ("support_value", "query_key", "recency", "distractor")
ANSWER_SCALARS = (
    "moving_answer_margin",
    "correct_value_logit",
    "negative_answer_loss",
    "fixed_source_competitor_margin",
    "fixed_target_competitor_margin",
    "source_best_wrong_logit",
    "target_best_wrong_logit",
)
complete_answer_scalar = complete_from(*ANSWER_SCALARS)
complete_role = complete_from(*ROLES)
complete_pair_type = complete_from(*PAIR_TYPES)

OutputDir = Annotated[Path, typer.Option(help="Folder of the report.")]
ProbeSet = Annotated[
    Path, typer.Option(help="Probe set (JSONL).", autocompletion=complete_probe_set)
]
TraceDir = Annotated[
    Path,
    typer.Option("--optimizer-trace-dir", help="Folder of a trace.", autocompletion=complete_trace),
]
CheckpointDir = Annotated[
    Path | None,
    typer.Option(help="Folder of checkpoints; all of them unless --checkpoint names some."),
]
Checkpoints = Annotated[
    list[Path] | None,
    typer.Option(
        "--checkpoint",
        help="Checkpoint, also any addressable step of a trace; repeatable.",
        autocompletion=complete_checkpoint,
    ),
]
Heads = Annotated[
    list[str] | None,
    typer.Option(
        "--head",
        help="Head, such as L2H1; repeatable. All by default.",
        autocompletion=complete_head,
    ),
]
ContextStage = Annotated[
    str | None,
    typer.Option(
        help="Stage at which a head's input is read; the one before it by default.",
        autocompletion=complete_stage,
    ),
]
LayernormMode = Annotated[
    str,
    typer.Option(
        help="head_ln1 (through the head's LayerNorm) or none.",
        autocompletion=complete_from("head_ln1", "none"),
    ),
]
ScoreQueryRole = Annotated[
    str, typer.Option(help="Role of the query position.", autocompletion=complete_role)
]
SupportKeyRole = Annotated[
    str, typer.Option(help="Role of the matched positions.", autocompletion=complete_role)
]
DistractorKeyRole = Annotated[
    str, typer.Option(help="Role of the compared positions.", autocompletion=complete_role)
]
RecordSide = Annotated[
    str,
    typer.Option(
        help="Side of the pairs: clean or corrupted.",
        autocompletion=complete_from(*SIDES),
    ),
]
PairTypes = Annotated[
    list[str] | None,
    typer.Option("--pair-type", help="Pair type; repeatable.", autocompletion=complete_pair_type),
]
MaxPairs = Annotated[
    int, typer.Option("--max-pairs-per-type", min=1, help="Pairs built of each type, at most.")
]
MinPairs = Annotated[
    int, typer.Option("--min-pairs-per-type", min=0, help="Fewer pairs of a type are an error.")
]
MaxRecords = Annotated[
    int | None, typer.Option(min=1, help="That many reads, in file order; all by default.")
]


def resolve_device(option: str | None, configured: str) -> str:
    """`--device`, else `CIRCUIT_DEVICE`, else the config's.

    Raises:
        CircuitError: the name is no device.
    """
    source, device = "the config", configured
    if option is not None:
        source, device = "--device", option
    elif os.environ.get("CIRCUIT_DEVICE"):
        source, device = "CIRCUIT_DEVICE", os.environ["CIRCUIT_DEVICE"]
    if device not in DEVICES:
        raise CircuitError(
            f"unknown device '{device}'", where=source, expected=f"one of {', '.join(DEVICES)}"
        )
    return device
