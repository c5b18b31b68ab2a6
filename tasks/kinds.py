"""Kinds of parameters: what a tensor is for, told by its role and its canonical name. The one place with that rule."""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["embedding", "head", "attention", "mlp", "other"]
FineKind = Literal["embedding", "head", "attention", "mlp", "norm", "bias", "other"]

# the module's own name: what the architectures of transformers call the layer that predicts tokens or classes
_HEAD = re.compile(r"lm_head|embed_out|output_projection|decoder|classifier|score|qa_outputs|proj_out")
_ATTENTION = re.compile(r"attn|attention")  # somewhere in the path: self_attn, SelfAttention, attention.output
# the module's own name, where the path says nothing
_PROJECTION = re.compile(r"(q|k|v|o|out|qkv)_proj|(q|k|v|out)_lin|query|key|value|query_key_value|qkv|to_[qkv]|c_attn")


_EXPERTS = re.compile(r"experts|\w*experts")  # of a module or its class: gate_up_proj [E, 2 I, H], down_proj [E, H, I]


def is_expert_stack(name: str, role: str, dimensions: int) -> bool:
    """Whether a tensor holds one matrix for each expert of a layer, as transformers keeps mixtures of experts."""
    where = (*name.split(".")[:-1], role.partition(".")[0])
    return dimensions == 3 and any(_EXPERTS.fullmatch(one) for one in where)


def kind_of(name: str, role: str) -> Kind:
    """The kind of tensor `name`, whose role is that of its record (`linear.weight`, `embedding.weight`, ...).

    Only weights have a kind of their own: biases, norms, convolutions, fused experts and bare parameters are other.
    Linear layers that neither predict nor attend count as mlp.
    """
    if role == "embedding.weight":
        return "embedding"
    if role != "linear.weight":
        return "other"
    path = name.split(".")
    module = path[-2] if len(path) > 1 else ""
    if _HEAD.fullmatch(module):
        return "head"
    if _PROJECTION.fullmatch(module) or any(_ATTENTION.search(one.lower()) for one in path[:-1]):
        return "attention"
    return "mlp"


def fine_kind_of(name: str, role: str) -> FineKind:
    """The same, with norms (their biases too) and the biases of other modules told apart from the rest of `other`."""
    kind = kind_of(name, role)
    if kind != "other":
        return kind
    module, _, leaf = role.rpartition(".")
    return "norm" if module == "norm" else "bias" if leaf == "bias" else "other"
