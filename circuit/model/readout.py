"""What logits say about right answers: margin, competitor, log-probability (definitions 3, 5).

Everything here takes logits that were read at the prediction positions, and token ids; it knows of
no task. The *competitor* of a read is the best of the other value tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from circuit.errors import CircuitError
from circuit.lazy import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor, nn
    from transformer_lens import HookedTransformer


LOGITS = "unembed.hook_out"
"""Hook point of the logits; what any module gives stands for it."""


@dataclass(frozen=True)
class Answers:
    """The logits of some reads, compared with the right answers.

    Attributes:
        correct: logit of the right value.
        competitor: token id of the best other value.
        best_wrong: its logit.
        log_probability: of the right value over the whole vocabulary (minus the answer loss).
        prediction: argmax over the whole vocabulary.
        answer: the right values' token ids.
    """

    correct: Float[Tensor, "*read"]
    competitor: Int[Tensor, "*read"]
    best_wrong: Float[Tensor, "*read"]
    log_probability: Float[Tensor, "*read"]
    prediction: Int[Tensor, "*read"]
    answer: Int[Tensor, "*read"]

    @property
    def margin(self) -> Float[Tensor, "*read"]:
        """The value margin: logit of the right value minus the competitor's."""
        return self.correct - self.best_wrong

    @property
    def is_answer(self) -> Bool[Tensor, "*read"]:
        """Whether the argmax over the whole vocabulary is the answer."""
        return self.prediction == self.answer

    @property
    def is_value(self) -> Bool[Tensor, "*read"]:
        """Whether the argmax over the value tokens is the answer."""
        return self.margin > 0


def readable(model: nn.Module, tokens: Int[Tensor, "row pos"]) -> Int[Tensor, "row read"]:
    """What a model reads of records: a HookedTransformer all, where it takes so many positions.

    Any other reads what it would in training: the last token is only predicted.
    """
    whole = hasattr(model, "hook_dict") and tokens.shape[1] <= cast("Any", model).cfg.n_ctx
    return tokens if whole else tokens[:, :-1]


def logits_of(model: nn.Module, tokens: Int[Tensor, "row pos"]) -> Float[Tensor, "row at vocab"]:
    """What a model of any class predicts behind each token that it reads (`readable`).

    One that is no HookedTransformer may give `[row, vocab]`, the logits of what follows the
    sequence; where it says nothing they are NaN, which no report takes.

    Raises:
        CircuitError: it gives something else.
    """
    read = readable(model, tokens)
    logits = model(read)
    logits = getattr(logits, "logits", logits)  # of Hugging Face's models
    shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if isinstance(logits, torch.Tensor) and logits.shape[:-1] == read.shape:
        return logits
    if isinstance(logits, torch.Tensor) and logits.shape[:-1] == read.shape[:1]:
        before = logits.new_full((*read.shape[:1], read.shape[1] - 1, logits.shape[-1]), torch.nan)
        return torch.cat([before, logits[:, None]], 1)  # [row, pos-1, vocab]
    raise CircuitError(
        f"the module gives {shape} of tokens {list(read.shape)}",
        expected=f"logits [{read.shape[0]}, {read.shape[1]}, token], or [{read.shape[0]}, token]",
    )


def read_answers(
    logits: Float[Tensor, "*read vocab"], answer: Int[Tensor, "*read"], values: range
) -> Answers:
    """Compare logits with the right answers; differentiable in `correct`, `best_wrong`, ...

    Args:
        answer: token ids of the right values, one a read.
        values: the value tokens, a contiguous range of ids.
    """
    answer = answer.to(logits.device)
    among = logits[..., values.start : values.stop]
    index = (answer - values.start)[..., None]
    best_wrong, competitor = among.scatter(-1, index, -torch.inf).max(-1)
    return Answers(
        correct=among.gather(-1, index)[..., 0],
        competitor=competitor + values.start,
        best_wrong=best_wrong,
        log_probability=logits.log_softmax(-1).gather(-1, answer[..., None])[..., 0],
        prediction=logits.argmax(-1),
        answer=answer,
    )


def lens(
    model: HookedTransformer, stage: str, vectors: Float[Tensor, "*place d_model"]
) -> Float[Tensor, "*place vocab"]:
    """The stage lens: unembedding of `ln_final(x)`, of `x` itself at `final_norm`."""
    if stage == "final_norm":
        return vectors @ model.W_U + model.b_U
    return unembedded(model, vectors)


def unembedded(
    model: HookedTransformer, residual: Float[Tensor, "*place d_model"]
) -> Float[Tensor, "*place vocab"]:
    """Logits of the last residual stage: through `ln_final`, where there is one, and `W_U`."""
    if model.cfg.normalization_type is not None:
        residual = model.ln_final(residual)
    return residual @ model.W_U + model.b_U
