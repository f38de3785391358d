"""A series of checkpoints of one model, of which nothing but weights is known; one at a time.

Its members are files of a HookedTransformer's weights (circuit/training/foreign.py), checkpoints of
this program, or folders that Hugging Face's `save_pretrained` has written (a Trainer's
`checkpoint-500`, a Pythia's `step1000`); their names tell the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from circuit.errors import CircuitError
from circuit.model.hugging_face import is_pretrained, load_pretrained
from circuit.model.kinds import build, installed_kind
from circuit.reading import checked_path, read_bytes
from circuit.training.checkpoints import checkpoint_step, load_checkpoint, read_header
from circuit.training.foreign import SUFFIXES, fitted, read_tensors
from circuit.training.imported import model_of, steps_of, told_settings

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


class CheckpointSeries:
    """The members of a series.

    Attributes:
        members: path of each by its step, ascending.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        """Find them; nothing is read yet.

        Args:
            paths: members, or folders of them.

        Raises:
            CircuitError: there is none; a name tells no step; two have the same.
        """
        listed = [member for path in map(checked_path, paths) for member in _members(path)]
        steps = steps_of(listed) if listed else []
        self.members = dict(sorted(zip(steps, listed, strict=True)))

    @property
    def steps(self) -> list[int]:
        """Ascending."""
        return list(self.members)

    def models(self) -> Iterator[tuple[int, HookedTransformer]]:
        """Every step with its model, in plain TransformerLens where it was trained elsewhere.

        Raises:
            CircuitError: a member is damaged, or no model of those that can be read.
        """
        for step, path in self.members.items():
            yield step, _load(path)


def _members(path: Path) -> list[Path]:
    """A member, or those in a folder, by name."""
    if not path.exists():
        raise CircuitError("no such file or folder", where=path)
    if not path.is_dir() or is_pretrained(path):
        return [path]
    inside = [one for one in sorted(path.iterdir()) if _is_member(one)]
    if not inside:
        raise CircuitError(
            "holds no checkpoint",
            where=path,
            expected=f"files ({', '.join(SUFFIXES)}), or folders of save_pretrained",
        )
    return inside


def _is_member(path: Path) -> bool:
    """Whether what stands in a folder is a checkpoint of a step; best, last and such are not."""
    told = any(letter.isdigit() for letter in path.stem)
    return told and (is_pretrained(path) if path.is_dir() else path.suffix in SUFFIXES)


def _load(path: Path) -> HookedTransformer:
    if path.is_dir():
        return load_pretrained(path)
    from circuit.model.layout import bridge_tensors, hooked_tensors
    from circuit.model.weights import load_tensors

    if checkpoint_step(path) is not None and _is_ours(path):
        state = load_checkpoint(path)
        config, tensors = state.config.model, state.parameters
        kernels = state.config.kernels
    else:
        raw = read_tensors(path, read_bytes(path, overhead=4))
        config = model_of(raw, path, told_settings([path]))
        config = config.model_copy(update={"tied_unembedding": False, "kind": installed_kind()})
        tensors = fitted(raw, config, len(raw["embed.W_E"]), path)
        if config.kind == "bridge":
            tensors = bridge_tensors(tensors)
        kernels = "plain"
    vocabulary = len(hooked_tensors(tensors, config)["embed.W_E"])
    model = build(config, vocabulary_size=vocabulary, seed=0, kernels=kernels)
    load_tensors(model, tensors)
    return model


def _is_ours(path: Path) -> bool:
    """Whether a file is a checkpoint of this program."""
    try:
        read_header(path)
    except CircuitError:
        return False
    return True
