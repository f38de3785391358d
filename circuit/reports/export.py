"""export: the model of a checkpoint as plain TransformerLens loads it.

`model.safetensors` holds its state_dict with an unembedding of its own, `config.json` its config:
of a HookedTransformer, or of the bridge that TransformerLens 4 makes of the same weights. What was
written is read again and compared with the run's model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from circuit.artifacts import OutputFolder, dump_json
from circuit.model.kinds import require_kind
from circuit.model.layout import bridge_config
from circuit.model.standard import (
    CONFIG,
    IMPORTS,
    LOAD,
    LOAD_BRIDGE,
    WEIGHTS,
    bridge_weights,
    load_bridge,
    load_standard,
    logit_gap,
    standard_config,
    standard_weights,
)
from circuit.reports.inputs import check_finite
from circuit.trace.states import States
from circuit.train_config import ModelKind, TrainConfig
from circuit.training.recipe_setup import setup_of

COMMAND = "export"


@dataclass(frozen=True)
class ExportResult:
    """An exported model.

    Attributes:
        step: of the checkpoint.
        paths: of the files.
        gap: largest absolute difference between the logits of the files' model, as TransformerLens
            computes it, and those of the run's.
        largest: of these logits, in absolute value.
        kernels: with which the run's model was computed.
        load: the Python lines that load it, after their imports.
    """

    step: int
    paths: list[Path]
    gap: float
    largest: float
    kernels: str
    load: list[str]

    @property
    def law(self) -> str:
        """What was checked, with its number."""
        return (
            "loaded again by plain TransformerLens, the files give the run's logits"
            f" ({self.kernels} kernels) to {self.gap:.2g}, of logits up to {self.largest:.3g},"
            " over 8 rows of random tokens"
        )


def export_checkpoint(
    config: TrainConfig,
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    kind: ModelKind | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Write the model of a checkpoint for other programs.

    Args:
        checkpoint: a file, or an addressable step of a trace.
        output_dir: folder of the two files.
        kind: of model that loads them: a HookedTransformer, or a bridge; the run's by default.
        overwrite: replace an earlier export there, and nothing else.

    Raises:
        CircuitError: the checkpoint is missing, damaged, or of another config or benchmark; the
            folder is not free; or a bridge's run is to be a HookedTransformer.
    """
    checkpoint, kind = Path(checkpoint), kind or config.model.kind
    if kind == "hooked_transformer":
        require_kind(kind)
    with OutputFolder(output_dir, COMMAND, writes=[WEIGHTS, CONFIG], overwrite=overwrite) as folder:
        folder.refuse_foreign([WEIGHTS, CONFIG])
        setup = setup_of(config, checkpoint)
        setup.require_task()
        states = States(setup)
        setup.check(states.header(checkpoint))
        state = states.state(checkpoint)
        check_finite(state, checkpoint)
        setup.prepare()
        model = setup.model(state)
        if kind == "bridge":
            weights = bridge_weights(state.parameters, config.model)
            settings = bridge_config(config.model, setup.benchmark.vocabulary.size)
            gap, largest = logit_gap(model, load_bridge(settings, weights))
        else:
            weights, settings = standard_weights(model), standard_config(model)
            gap, largest = logit_gap(model, load_standard(settings, weights))
        folder.clear(planned=[WEIGHTS, CONFIG])
        paths = [
            folder.write_bytes(WEIGHTS, weights),
            folder.write_text(CONFIG, dump_json(settings)),
        ]
        weights_path, config_path = map(str, paths)
        load = LOAD_BRIDGE if kind == "bridge" else LOAD
        lines = [line.format(config=config_path, weights=weights_path) for line in load]
    return ExportResult(state.step, paths, gap, largest, config.kernels, [IMPORTS, *lines])
