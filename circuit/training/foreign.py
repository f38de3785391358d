"""Weights that another program has saved: a file in, tensors of this study's model out.

A `.safetensors` file, or a `torch.save` of a `state_dict`, of a HookedTransformer, in any order of
names. Nothing in a file is executed. The shape of the model is read off the tensors, but for the
activation and the normalization, which they do not tell (tensors without LayerNorms are those of a
model that has none, and of one whose LayerNorms were folded into other weights). A file that is not
of learned absolute positions and one causal attention a block, with one MLP a block or none, is
refused with the name and the shape that say so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuit.config import parse_config
from circuit.errors import CircuitError
from circuit.lazy import torch
from circuit.model.shapes import BLOCK, expected_shapes
from circuit.train_config import ModelConfig
from circuit.training.unpickle import unpickle

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = dict[str, Tensor]

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training loops keep a model's state_dict beside other things."""

BIASES = ("attn.b_Q", "attn.b_K", "attn.b_V", "attn.b_O", "mlp.b_in", "mlp.b_out")
"""Kinds that a file may leave out in every block: without a bias is with a bias of zero."""

_KIND = "a HookedTransformer with learned positions, one attention a block, one MLP a block or none"


def read_tensors(path: Path, payload: bytes) -> Tensors:
    """The named tensors of a file; nothing in it is executed.

    Args:
        path: of the file, whose suffix tells the format.
        payload: its bytes.

    Raises:
        CircuitError: it is damaged, holds more than tensors, or no state_dict.
    """
    if path.suffix == ".safetensors":
        content: Any = _read_safetensors(path, payload)
    else:
        content = unpickle(
            payload,
            where=path,
            more="save the tensors alone where the file comes from:"
            " safetensors.torch.save_file or torch.save of model.state_dict()",
            damaged="save it again",
        )
    unwrapped = _unwrapped(content, path)
    embeddings = [name for name in unwrapped if _is_embedding(name)]
    if len(embeddings) > 1:
        raise CircuitError(
            f"holds weights twice: {' and '.join(embeddings[:2])}",
            where=path,
            expected="those of one model",
        )
    prefix = "".join(embeddings).removesuffix("embed.W_E")
    named = {name.removeprefix(prefix): tensor for name, tensor in unwrapped.items()}
    if len(named) < len(unwrapped):
        raise CircuitError(
            f"holds names both with and without {prefix!r}", where=path, expected="one model"
        )
    for name, tensor in named.items():
        if tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu":
            raise CircuitError(f"{name} is no plain tensor", where=path)
        if tensor.layout != torch.strided or _claimed(tensor) > tensor.untyped_storage().nbytes():
            raise CircuitError(f"{name} is not stored in full", where=path)
    return named


def _is_embedding(name: str) -> bool:
    """`embed.W_E`, behind what wrappers such as `module.` put before it."""
    return name == "embed.W_E" or name.endswith(".embed.W_E")


def _claimed(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _read_safetensors(path: Path, payload: bytes) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(payload)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CircuitError(f"is no safetensors file ({error})", where=path) from None


def _unwrapped(content: Any, path: Path) -> Tensors:
    """The state_dict in what was saved: itself, or under one of `WRAPPERS`."""
    if isinstance(content, Mapping):
        for key in WRAPPERS:
            if _is_state_dict(content.get(key)):
                return dict(content[key])
        if _is_state_dict(content):
            return dict(content)
        if "parameters" in content:
            raise CircuitError(
                "is a checkpoint of this program",
                where=path,
                fix="open the run that it belongs to; nothing is to be imported",
            )
    keys = list(content) if isinstance(content, Mapping) else type(content).__name__
    raise CircuitError(
        f"holds no state_dict: {keys if isinstance(keys, str) else keys[:5]}",
        where=path,
        expected=f"named tensors, or those under one of {', '.join(WRAPPERS)}",
    )


def _is_state_dict(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in content.items())
    )


def infer_model(
    tensors: Mapping[str, Tensor], where: Path, told: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The shape of the model, from tensors whose names and shapes tell it.

    Args:
        told: fields that tensors do not tell, such as `activation`.

    Raises:
        CircuitError: one that tells it is missing, or it is no model of this study.
    """

    def shape(name: str, axes: str) -> list[int]:
        if name not in tensors:
            raise CircuitError(f"holds no {name}", where=where, expected=_KIND, fix=_held(tensors))
        sizes = list(tensors[name].shape)
        if len(sizes) != len(axes.split()):
            raise CircuitError(f"{name} has shape {sizes}", where=where, expected=f"[{axes}]")
        return sizes

    d_model = shape("embed.W_E", "d_vocab d_model")[1]
    heads, _, d_head = shape("blocks.0.attn.W_Q", "head d_model d_head")
    if heads * d_head != d_model:
        raise CircuitError(
            f"blocks.0.attn.W_Q has {heads} heads of width {d_head}",
            where=where,
            expected=f"heads whose widths add up to d_model {d_model}",
        )
    blocks = [match for name in tensors if (match := BLOCK.fullmatch(name))]
    has_mlps = any(block[2].startswith("mlp.") for block in blocks)
    payload = {
        "layers": _count_blocks(tensors, where),
        "heads": heads,
        "d_model": d_model,
        "d_ff": shape("blocks.0.mlp.W_in", "d_model d_mlp")[1] if has_mlps else 0,
        "max_sequence_length": shape("pos_embed.W_pos", "n_ctx d_model")[0],
        **(told or {}),
    }
    return parse_config(payload, ModelConfig, where=where)


def _count_blocks(tensors: Mapping[str, Tensor], where: Path) -> int:
    numbers = {block[1] for name in tensors if (block := BLOCK.fullmatch(name))}
    for number in range(len(numbers)):
        if str(number) not in numbers:
            raise CircuitError(
                f"holds {len(numbers)} blocks and no blocks.{number}", where=where, expected=_KIND
            )
    return len(numbers)


def _held(tensors: Mapping[str, Tensor]) -> str:
    names = list(tensors)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"the file holds {', '.join(names[:4])}{more}"


def absent_biases(tensors: Mapping[str, Tensor], config: ModelConfig) -> list[str]:
    """Kinds of biases that no block holds, and that are zero therefore."""
    held = {match[2] for name in tensors if (match := BLOCK.fullmatch(name))}
    kinds = [kind for kind in BIASES if not (config.attention_only and kind.startswith("mlp."))]
    return [kind for kind in kinds if kind not in held]


def is_tied(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the unembedding is the embedding, value by value, and its bias is zero."""
    matrix, bias = tensors.get("unembed.W_U"), tensors.get("unembed.b_U")
    same = matrix is None or torch.equal(matrix, tensors["embed.W_E"].T)
    return same and (bias is None or not bool(bias.any()))


def fitted(
    tensors: Mapping[str, Tensor], config: ModelConfig, vocabulary_size: int, where: Path
) -> Tensors:
    """A file's tensors as the model's parameters: by name, in the model's order, float32.

    Args:
        tensors: of the file.
        config: the model's shape; untied, it also takes a file whose unembedding is tied.
        vocabulary_size: number of tokens of the benchmark.
        where: the file, for messages.

    Raises:
        CircuitError: a name is missing or unknown, a shape is another, or values have no exact
            float32 form.
    """
    shapes = expected_shapes(config, vocabulary_size)
    zero = absent_biases(tensors, config)
    given = dict(tensors)
    _drop_buffers(given, config, where)
    if config.tied_unembedding:
        given = {n: t for n, t in given.items() if not n.startswith("unembed.")}
    elif "unembed.W_U" not in given:
        given["unembed.W_U"] = given["embed.W_E"].T
    for name in shapes:
        block = BLOCK.fullmatch(name)
        if name not in given and (block[2] in zero if block else name == "unembed.b_U"):
            given[name] = torch.zeros(shapes[name])
    _check_names(given, shapes, where)
    for name, shape in shapes.items():
        if list(given[name].shape) != shape:
            raise CircuitError(
                f"{name} has shape {list(given[name].shape)}",
                where=where,
                expected=f"{shape}, as the benchmark's {vocabulary_size} tokens and the other"
                " tensors and files ask for",
            )
    return {name: _as_float32(name, given[name], where) for name in shapes}


def _check_names(given: Mapping[str, Tensor], shapes: Mapping[str, Any], where: Path) -> None:
    missing = [name for name in shapes if name not in given]
    unknown = [name for name in given if name not in shapes]
    if not missing and not unknown:
        return
    parts = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("holds no", missing), ("holds the unknown", unknown))
        if names
    ]
    norms = missing and all(re.search(r"\bln(?:1|2|_final)\.", name) for name in missing)
    raise CircuitError(
        " and ".join(parts),
        where=where,
        expected=_KIND,
        fix="a model without normalization says so in a config.json beside the file:"
        ' "normalization_type": null, with its "act_fn"'
        if norms
        else None,
    )


def _drop_buffers(given: Tensors, config: ModelConfig, where: Path) -> None:
    """Remove what TransformerLens keeps beside parameters, where it is that of causal attention."""
    length = config.max_sequence_length
    causal = torch.ones(length, length).tril().bool()
    for name in [name for name in given if name.endswith((".attn.mask", ".attn.IGNORE"))]:
        buffer = given.pop(name)  # the mask is empty since it is made where it is used
        if name.endswith(".mask") and buffer.numel() and not torch.equal(buffer.bool(), causal):
            raise CircuitError(f"{name} is not causal over {length} positions", where=where)


def _as_float32(name: str, tensor: Tensor, where: Path) -> Tensor:
    single = tensor.detach().to(torch.float32)
    if tensor.is_floating_point() and not torch.isfinite(single).all():
        raise CircuitError(f"{name} holds values that are not finite", where=where)
    if not tensor.is_floating_point() or not torch.equal(single.to(tensor.dtype), tensor):
        raise CircuitError(
            f"{name} is {tensor.dtype} and has no exact float32 form",
            where=where,
            fix="save the tensors as float32 (`tensor.float()`), which rounds them",
        )
    return single.contiguous().clone()
