"""What shell completion offers for the values of options: names, and paths of what is there.

Completers see the command line so far and must stay quick: they import no torch, and look only
under `configs/`, `data/` and `artifacts/` of the current folder. Where one offers nothing, shells
go on with file names (cli/shells.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from circuit.strict_json import parse_json

if TYPE_CHECKING:
    from pydantic import BaseModel

    from circuit.tasks.base import Task

DEVICES = ("cpu", "cuda", "mps")
DEFAULT_SPLITS = (
    "train",
    "validation_iid",
    "test_iid",
    "heldout_pairs",
    "structural_ood",
    "counterfactual",
)
ROUTE_KEYS = ("label", "stage", "subspace", "rank", "head_layer", "head", "position_role")
SCALES = ("full", "uniform", "short", "smoke")
MOST_BYTES = 2**20  # of a file that is read
MOST_OFFERED = 64  # layers, and heads


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    """Those that a terminal can show on one line: shells get one name a line."""
    return [name for name in names if name.startswith(incomplete) and name.isprintable()]


def values(*names: str) -> Callable[[str], list[str]]:
    """A completer for a fixed set of values."""
    return lambda incomplete: _starting(incomplete, names)


quickstart_task = values("symbolic_kv", "induction", "modular_addition")
basis = values("source", "full", "step:")
path_rule = values("midpoint", "midpoint:10", "simpson", "gauss:2", "gauss:3", "auto:1e-3")


# --- paths ----------------------------------------------------------------------------------------


def _paths(incomplete: str, paths: Iterable[Path]) -> list[str]:
    return sorted(_starting(incomplete, map(str, paths)))


def _configs() -> list[Path]:
    """Under configs/, and of the runs under artifacts/."""
    return [*Path("configs").rglob("*.json"), *Path("artifacts").rglob("run_config.json")]


def benchmark_config(incomplete: str) -> list[str]:
    """Configs of benchmarks."""
    return _paths(incomplete, [path for path in _configs() if "benchmark" in path.parts])


def train_config(incomplete: str) -> list[str]:
    """Configs of training runs."""
    return _paths(incomplete, [path for path in _configs() if "benchmark" not in path.parts])


def run(incomplete: str) -> list[str]:
    """Folders of runs under artifacts/."""
    configs = Path("artifacts").rglob("run_config.json")
    return _paths(incomplete, [path.parent for path in configs])


def benchmark(incomplete: str) -> list[str]:
    """Folders of benchmarks under data/."""
    return _paths(incomplete, [path.parent for path in Path("data").rglob("metadata.json")])


def trace(incomplete: str) -> list[str]:
    """Folders of traces and of recordings under artifacts/."""
    manifests = (Path("artifacts").rglob(name) for name in ("trace.json", "recording.json"))
    return _paths(incomplete, [path.parent for paths in manifests for path in paths])


def probe_set(incomplete: str) -> list[str]:
    """Probe sets under artifacts/."""
    return _paths(incomplete, Path("artifacts").rglob("probe_set*.jsonl"))


def artifact(pattern: str) -> Callable[[str], list[str]]:
    """A completer for the files under artifacts/ whose names match."""
    return lambda incomplete: _paths(incomplete, Path("artifacts").rglob(pattern))


weights = artifact("*.safetensors")
route_closure_rows = artifact("route_to_margin_closure_rows.jsonl")
scalar_pair_rows = artifact("answer_scalar_residual_diagnosis_pair_rows.jsonl")
separation_rows = artifact("bilinear_qk_match_separation_rows.jsonl")
report = artifact("*_report.json")
edits = artifact("*edits*.jsonl")
scores = artifact("*.npz")
claims = artifact("claims_*.json")
score = values("rank8", "full")


def own_code(incomplete: str) -> list[str]:
    """Of `FILE.py:NAME`, once the file is typed, what it defines: it is read, and not executed."""
    import ast

    name, colon, _ = incomplete.partition(":")
    path = Path(name)
    try:
        if not colon or path.stat().st_size > MOST_BYTES:
            return []
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    defined = [node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assigned = [node for node in body if isinstance(node, ast.Assign)]

    def may_be_called(value: ast.expr) -> bool:  # no number, and no tensor of torch's functions
        if not isinstance(value, ast.Call):
            return isinstance(value, ast.Lambda)
        parts = ast.unparse(value.func).split(".")
        return parts[0] in defined or any(part[:1].isupper() for part in parts)

    targets = [target for node in assigned if may_be_called(node.value) for target in node.targets]
    defined += [target.id for target in targets if isinstance(target, ast.Name)]
    return _starting(incomplete, (f"{name}:{one}" for one in defined))


def attribution(incomplete: str) -> list[str]:
    """Folders of attribution reports under artifacts/."""
    reports = Path("artifacts").rglob("*_attribution_report.json")
    return _paths(incomplete, [path.parent for path in reports])


def checkpoint(ctx: typer.Context, incomplete: str) -> list[str]:
    """Checkpoints of the run whose config the command line names, else of every run."""
    of_run = _config_path(ctx).parent / "checkpoints"
    folders = [of_run] if of_run.is_dir() else Path("artifacts/runs").rglob("checkpoints")
    return _paths(incomplete, [path for folder in folders for path in folder.glob("*.pt")])


def checkpoint_dir(ctx: typer.Context, incomplete: str) -> list[str]:
    """Folders of checkpoints of that run, its traces' among them, else of every run."""
    run_folder = _config_path(ctx).parent
    root = run_folder if (run_folder / "checkpoints").is_dir() else Path("artifacts/runs")
    return _paths(incomplete, root.rglob("checkpoints"))


# --- what the config on the command line decides --------------------------------------------------


def _config_path(ctx: typer.Context) -> Path:
    """The config that the line names so far; a run's folder stands for its config."""
    path = Path(ctx.params.get("config") or "")
    try:
        return path / "run_config.json" if (path / "run_config.json").is_file() else path
    except OSError:  # a name too long
        return Path()


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, since half a command line is no error."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return {}
        payload = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return payload if isinstance(payload, dict) else {}


def _config(ctx: typer.Context) -> dict[str, Any]:
    return _read(_config_path(ctx))


def split(ctx: typer.Context, incomplete: str) -> list[str]:
    """Splits of the benchmark that the line names so far, else the usual ones."""
    folder = ctx.params.get("benchmark_dir") or _config(ctx).get("benchmark_dir")
    splits = _read(Path(str(folder)) / "metadata.json").get("splits")
    return _starting(incomplete, splits if isinstance(splits, dict) else DEFAULT_SPLITS)


def _model_shape(ctx: typer.Context) -> tuple[int, int, bool]:
    """Layers and heads of the config that the line names so far, and whether it has no MLPs; else
    of the reference."""
    model = _config(ctx).get("model")
    if isinstance(model, dict):
        layers, heads = model.get("layers"), model.get("heads")
        if (
            isinstance(layers, int)
            and isinstance(heads, int)
            and max(layers, heads) <= MOST_OFFERED
        ):
            return layers, heads, model.get("d_ff") == 0
    return 3, 4, False


def stage(ctx: typer.Context, incomplete: str) -> list[str]:
    """Stages of the residual stream."""
    from circuit.model.stages import stage_names

    layers, _, attention_only = _model_shape(ctx)
    return _starting(incomplete, stage_names(layers, attention_only=attention_only))


def head(ctx: typer.Context, incomplete: str) -> list[str]:
    """Heads by address, such as L2H1."""
    layers, heads, _ = _model_shape(ctx)
    return _starting(incomplete, [f"L{x}H{y}" for x in range(layers) for y in range(heads)])


def mlp(ctx: typer.Context, incomplete: str) -> list[str]:
    """MLPs by address, such as L1MLP."""
    layers, _, attention_only = _model_shape(ctx)
    every = [] if attention_only else [f"L{layer}MLP" for layer in range(layers)]
    return _starting(incomplete, every)


def component(ctx: typer.Context, incomplete: str) -> list[str]:
    """Heads and MLPs by address."""
    return head(ctx, incomplete) + mlp(ctx, incomplete)


def task(incomplete: str) -> list[str]:
    """Tasks by name."""
    from circuit.tasks.registry import BUILT_IN

    return _starting(incomplete, BUILT_IN)


def _task_named(name: object) -> type[Task] | None:
    """A task of ours; one of somebody's own is not imported to complete a word."""
    from circuit.tasks.registry import BUILT_IN, find_task

    return find_task(name) if isinstance(name, str) and name in BUILT_IN else None


def _task(ctx: typer.Context) -> type[Task] | None:
    """The task of the benchmark that the line's config names, lookup where there is none."""
    folder = Path(str(_config(ctx).get("benchmark_dir")))
    config = _read(folder / "metadata.json").get("config")
    name = config.get("benchmark_type") if isinstance(config, dict) else "symbolic_kv_stream"
    return _task_named(name)


def role(ctx: typer.Context, incomplete: str) -> list[str]:
    """Roles of the run's task."""
    task = _task(ctx)
    return [] if task is None else _starting(incomplete, task.roles)


def single_role(ctx: typer.Context, incomplete: str) -> list[str]:
    """Roles that are one position."""
    task = _task(ctx)
    return [] if task is None else _starting(incomplete, task.single_roles())


def pair_type(ctx: typer.Context, incomplete: str) -> list[str]:
    """Pair types of the run's task."""
    task = _task(ctx)
    return [] if task is None else _starting(incomplete, task.pair_types)


def group_by(ctx: typer.Context, incomplete: str) -> list[str]:
    """Tokens by which the run's examples can be grouped."""
    from circuit.tasks.groups import groups_of

    task = _task(ctx)
    return [] if task is None else _starting(incomplete, groups_of(task))


def task_slice(ctx: typer.Context, incomplete: str) -> list[str]:
    """Facts by which the run's task has figures given apart."""
    task = _task(ctx)
    return [] if task is None else _starting(incomplete, task.slices)


def subspace(ctx: typer.Context, incomplete: str) -> list[str]:
    """Subspaces of the residual stream."""
    from circuit.model.subspaces import subspaces_of

    task = _task(ctx)
    return _starting(incomplete, subspaces_of(() if task is None else task.token_set_names))


def edit(incomplete: str) -> list[str]:
    """The next key of an edit's word, behind its label, or what its value begins with."""
    before, comma, last = incomplete.rpartition(",")
    if not comma:
        return []
    from circuit.core.edit import DIRECTIONS, SETTINGS
    from circuit.core.update import AdamWRule, SGDRule
    from circuit.reports.edits import KEYS

    key, equals, value = last.partition("=")
    if not equals:
        return [f"{before},{name}=" for name in _starting(key, sorted(KEYS))]
    offered = {
        "scale": [f"{name}*" for name in dict.fromkeys((*AdamWRule.names, *SGDRule.names))],
        "set": [f"{name}*" for name in SETTINGS],
        "direction": DIRECTIONS,
    }
    return [f"{before},{key}={one}" for one in _starting(value, offered.get(key, ()))]


def scalar(ctx: typer.Context, incomplete: str) -> list[str]:
    """A scalar's family, the next key of its word, or the values of the key that is being typed.

    Of `FILE.py:NAME`, what the file defines.
    """
    from circuit.scalars.family import family_names, find_family, keys_of

    before, comma, last = incomplete.rpartition(",")
    if not comma:
        return _starting(last, family_names()) or own_code(last)
    family = find_family(before.partition(",")[0])
    if family is None:
        return []
    key, equals, value = last.partition("=")
    keys = keys_of(family)
    if not equals:
        return [f"{before},{name}=" for name in _starting(key, keys)]
    option = family.declared().get(keys.get(key, ""))
    if option is None:
        return []
    offered = _starting(value, option.choices)
    if option.kind:
        completer = globals()[option.kind]
        takes_context = len(inspect.signature(completer).parameters) == 2
        offered = completer(ctx, value) if takes_context else completer(value)
    return [f"{before},{key}={one}" for one in offered]


def route(ctx: typer.Context, incomplete: str) -> list[str]:
    """The next key of a route, or the values of the key that is being typed."""
    before, comma, last = incomplete.rpartition(",")
    key, equals, value = last.partition("=")
    start = before + comma
    if not equals:
        present = {part.partition("=")[0] for part in before.split(",")}
        return [f"{start}{k}=" for k in ROUTE_KEYS if k.startswith(key) and k not in present]
    of_key = {"stage": stage(ctx, value), "position_role": role(ctx, value)}
    of_key["subspace"] = subspace(ctx, value)
    return [f"{start}{key}={name}" for name in of_key.get(key, [])]


def train_field(ctx: typer.Context, incomplete: str) -> list[str]:
    """`field=` of a training config, or `field=value`."""
    from circuit.train_config import TrainConfig

    return _field(ctx, incomplete, TrainConfig)


def benchmark_field(ctx: typer.Context, incomplete: str) -> list[str]:
    """`field=` of a benchmark config, or `field=value`; of lookup's where none is named yet."""
    from circuit.tasks.base import TaskConfig

    task = _task_named(_config(ctx).get("benchmark_type", "symbolic_kv_stream"))
    return _field(ctx, incomplete, TaskConfig if task is None else task.Config)


def _field(ctx: typer.Context, incomplete: str, kind: type[BaseModel]) -> list[str]:
    from circuit.overrides import field_names, field_values

    payload = _config(ctx)
    payload.pop("overrides", None)  # a run's record of them, no field
    name, sign, value = incomplete.partition("=")
    if sign:
        return [f"{name}={one}" for one in _starting(value, field_values(kind, payload, name))]
    present = {text.partition("=")[0] for text in ctx.params.get("overrides") or ()}
    names = [field for field in field_names(kind, payload) if field not in present]
    return [f"{field}=" for field in _starting(name, names)]
