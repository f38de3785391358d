"""What TransformerLens calls a transformer's parameters: a HookedTransformer's names, a bridge's.

A HookedTransformer (TransformerLens 3) names matrices (`blocks.0.attn.W_Q`), a bridge around a
native model (TransformerLens 4) the linear maps that hold them (`blocks.0.attn.q.weight`). Of a
bridge torch itself gives the paths inside it:
`layers.0._original_component.attn._original_component.q._original_component.weight`.
"""

from __future__ import annotations

import re

_WRAPPED = "._original_component"
_MODULES = {
    r"^tok_embed\.": "embed.",
    r"^pos\.": "pos_embed.",
    r"^layers\.": "blocks.",
    r"\.mlp\.fc_": ".mlp.",
    r"^ln_out\.": "ln_final.",
    r"^head\.": "unembed.",
}
"""What TransformerLens's native model calls otherwise than the bridge around it."""

_HOOKED = re.compile(
    r"(?P<module>embed|pos_embed|ln_final|unembed|blocks\.\d+\.(?:ln[12]|attn|mlp))\."
    r"(?P<kind>[Wb]|w)(?:_(?P<which>E|pos|U|Q|K|V|O|in|out))?"
)
_BRIDGE = re.compile(
    r"(?P<module>embed|pos_embed|ln_final|unembed|blocks\.\d+\.(?:ln[12]|attn|mlp))"
    r"(?:\.(?P<which>[qkvo]|in|out))?\.(?P<kind>weight|bias)"
)
_WHICH = {"embed": "E", "pos_embed": "pos", "unembed": "U"}
"""The matrix of a module that has one."""


def bridge_name(path: str) -> str:
    """A parameter's name in a bridge's `state_dict`, from its path inside the bridge."""
    name = path.replace(_WRAPPED, "")
    for pattern, replacement in _MODULES.items():
        name = re.sub(pattern, replacement, name)
    return name


def hooked_name(name: str) -> str:
    """A HookedTransformer's name of what a bridge calls `name`; any other name stays as it is."""
    match = _BRIDGE.fullmatch(bridge_name(name) if _WRAPPED in name else name)
    if match is None:
        return name
    module, which = match["module"], match["which"] or _WHICH.get(match["module"])
    if which is None:  # of a LayerNorm
        return f"{module}.{match['kind'][0]}"
    which = which.upper() if module.endswith(".attn") else which
    return f"{module}.{'W' if match['kind'] == 'weight' else 'b'}_{which}"


def bridge_name_of(name: str) -> str:
    """A bridge's name of what a HookedTransformer calls `name`; any other name stays as it is."""
    match = _HOOKED.fullmatch(name)
    if match is None:
        return name
    module, which = match["module"], match["which"]
    part = "" if which is None or module in _WHICH else f".{which.lower()}"
    return f"{module}{part}.{'bias' if match['kind'] == 'b' else 'weight'}"
