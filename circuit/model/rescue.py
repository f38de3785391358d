"""What may stand in for a removed code, and how much of it that brings back (definitions.md 6).

Pure arithmetic on vectors `[read, d_model]` and scalars `[read, scalar]` in float64; which stage
and role they come from, and what a read is, the caller knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from circuit.core.intervals import RecordDraws, finite
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.codes import RidgeMap, Vectors
from circuit.model.subspaces import Basis, identity_basis

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

CONTROLS = ("shuffled_answer_value", "wrong_support_value", "random_subspace", "key_identity")

Code: TypeAlias = "Float[Tensor, 'read rank']"


def condition_codes(
    vectors: Mapping[str, Vectors],
    *,
    groups: Int[Tensor, " read"],
    fit: Int[Tensor, " fit"],
    held_out: Int[Tensor, " held_out"],
    shuffled: Int[Tensor, " held_out"],
    controls: Sequence[str],
    rank: int,
    context_rank: int,
    ridge: float,
    seed: int,
) -> tuple[Basis, dict[str, Code | None]]:
    """The target's basis, and the code that each condition writes on the reads held out.

    A control replaces the source: alone (`<control>`), and beside the read's own context
    (`<control>_plus_context`). `random_subspace` and `key_identity` refit bases and maps;
    `shuffled_answer_value` and `wrong_support_value` use those of the true source.

    Args:
        vectors: `source`, `target`, `context` and, for those controls, `wrong_support_value` and
            `key_identity`, of all reads.
        groups: token of each read, by which identity bases are taken.
        fit, held_out: indices of the reads for fitting and for evaluation.
        shuffled: the read whose source stands in for that of each read held out.
        seed: of the random subspace.

    Returns:
        `[d_model, rank]`, and codes by condition; None leaves the activation as it is.
    """

    def coordinates(name: str, count: int) -> tuple[Basis, Code]:
        basis = identity_basis(vectors[name][fit], groups[fit], count)
        return basis, vectors[name] @ basis

    target_basis, target = coordinates("target", rank)
    source_basis, source = coordinates("source", rank)
    _, context = coordinates("context", context_rank)

    def alone(x: Code, at: Code) -> Code:
        """The map fitted on coordinates `x`, at the coordinates `at`."""
        return RidgeMap.fit(x[fit], target[fit], ridge)(at)

    def beside(x: Code, at: Code) -> Code:
        """The same with the context's coordinates beside them."""
        return alone(torch.cat([x, context], 1), torch.cat([at, context[held_out]], 1))

    codes: dict[str, Code | None] = {
        "clean": None,
        "removed": torch.zeros_like(target[held_out]),
        "oracle": target[held_out],
        "true_transfer": alone(source, source[held_out]),
        "context_only": alone(context, context[held_out]),
        "source_plus_context": beside(source, source[held_out]),
    }
    for control in controls:
        x, at = source, source[shuffled]
        if control == "wrong_support_value":
            at = vectors[control][held_out] @ source_basis
        elif control == "random_subspace":
            x = vectors["source"] @ random_basis(len(source_basis), rank, seed)
            at = x[held_out]
        elif control == "key_identity":
            _, x = coordinates(control, rank)
            at = x[held_out]
        codes[control] = alone(x, at)
        codes[f"{control}_plus_context"] = beside(x, at)
    return target_basis, codes


def removed_share(
    vectors: Vectors, basis: Basis, keys: Int[Tensor, " read"]
) -> tuple[float, float | None]:
    """How much of the vectors a basis takes, and how much of it is the query's key.

    Returns:
        Mean of `|B^T x|² / |x|²`; and the mean squared cosine with which the basis holds the
        directions of an identity basis by `keys` of full rank (None with one key): 1 if removing
        the basis removes all that tells the keys' means apart.
    """
    share = (vectors @ basis).square().sum(1) / vectors.square().sum(1)
    count = len(torch.unique(keys))
    if count < 2:
        return float(share.mean()), None
    of_keys = identity_basis(vectors, keys, min(count - 1, *vectors.shape))
    # squared cosines of its directions with the basis: squared norms of the columns of B^T K
    return float(share.mean()), float((of_keys.T @ basis).square().sum() / of_keys.shape[1])


def random_basis(d_model: int, rank: int, seed: int) -> Basis:
    """An orthonormal basis of a uniformly random subspace, float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(d_model, rank, dtype=torch.float64, generator=generator)
    basis: Tensor = torch.linalg.qr(drawn).Q
    return basis


def next_other(answers: Int[Tensor, " read"]) -> Int[Tensor, " read"]:
    """For each read, the index of the next one (cyclic) with another answer.

    Raises:
        CircuitError: all answers are one.
    """
    twice = torch.cat([answers, answers])  # so that the search behind the last goes on at the first
    changes = (twice[1:] != twice[:-1]).nonzero()[:, 0] + 1  # all before the next one are equal
    if not len(changes):
        raise CircuitError("all evaluation reads have one answer", expected="at least two answers")
    after = torch.searchsorted(changes, torch.arange(len(answers)), right=True)
    return changes[after] % len(answers)


def explained(code: Code | None, true: Code | None) -> float | None:
    """R²: the share of the true code's variance over reads that a code explains, 1 at most.

    None where nothing was written, or the true code does not vary.
    """
    if code is None or true is None:
        return None
    total = (true - true.mean(0)).square().sum()
    return finite(1 - (code - true).square().sum() / total)


def rescue_fractions(
    values: Mapping[str, Float[Tensor, "read scalar"]],
    records: Int[Tensor, " read"],
    condition: str,
    seed: int,
) -> list[tuple[float | None, float | None, float | None]]:
    """`(patched - removed) / (clean - removed)` of means, with a 95 % bootstrap interval.

    Args:
        values: float64, by condition.
        records: the record of each read.

    Returns:
        Fraction, low and high for each scalar; None where removal changes nothing (low and high:
        in some draw, or there is one record).
    """
    gained, lost = (values[name] - values["removed"] for name in (condition, "clean"))
    ends = RecordDraws(records, seed).ratios(gained, lost)
    whole = gained.mean(0) / lost.mean(0)
    return [(finite(value), *of) for value, of in zip(whole, ends, strict=True)]
