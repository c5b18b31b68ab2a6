"""Blocks: how deep in the network a parameter is, read from its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from storage.errors import InvalidInput

# What architectures keep their residual blocks in: ViT, CLIP and Llama; BERT; T5; timm and MPT; OpenCLIP; GPT-2
_CONTAINERS = "layers|layer|block|blocks|resblocks|h"
_BLOCK = re.compile(rf"(?P<stack>(?:[^.]+\.)*?(?:stages|{_CONTAINERS}))\.(?P<stage>\d+)\.(?P<rest>.+)")
_IN_STAGE = re.compile(r"(?:layers|blocks)\.(?P<index>\d+)\.(?P<rest>.+)")
_STAGED = ("stages", "layers")  # containers whose members may be stages that hold blocks: ConvNeXt, Swin


class Block(NamedTuple):
    """Where a parameter is.

    stack:         the name of the container
    stage, number: the place in it; a block that is in no stage is a stage of its own
    inside:        whether a module of the block has the parameter, rather than the block itself
    """

    stack: str
    stage: int
    number: int
    inside: bool


def block_of(name: str) -> Block | None:
    """The block that a parameter's name says it is in; None outside of blocks.

    The outermost container decides: `encoder.block.7.layer.0.` of T5 is block 7, `layers.3.mlp.experts.0.` of a
    mixture of experts is block 3. Stages are the exception, `stages.1.layers.2.` is the third block of the second one;
    what a stage has beside its blocks counts with the first of them. Two towers, or encoder and decoder, are two
    stacks.
    """
    found = _BLOCK.fullmatch(name)
    if found is None:
        return None
    inner = _IN_STAGE.fullmatch(found["rest"]) if found["stack"].rpartition(".")[2] in _STAGED else None
    inside = "." in (inner or found)["rest"]
    return Block(found["stack"], int(found["stage"]), int(inner["index"]) if inner else 0, inside)


def blocks_of(names: Iterable[str]) -> dict[str, Block]:
    """The blocks of those names that are in one.

    A stack without modules is no stack of blocks: `head.layers.0.weight` is a layer of a small head.
    """
    blocks = {name: block for name in names if (block := block_of(name))}
    stacks = {block.stack for block in blocks.values() if block.inside}
    return {name: block for name, block in blocks.items() if block.stack in stacks}


def depths(names: Iterable[str]) -> Mapping[str, float]:
    """(l - 1) / (L - 1) of every name: 0 in the first block of its stack and outside of blocks, 1 in the last.

    The one block of a stack of one is its first. Raises InvalidInput if there are names, and none is in a block.
    """
    names = list(names)
    blocks = blocks_of(names)
    if names and not blocks:
        raise InvalidInput(
            f"expected parameters in blocks, such as 'layers.0.mlp.weight', found {_some(names)}",
            remedy="Scaling by depth does not know this architecture: take the scaling `match_norm`, or none",
        )
    stacks = {block.stack for block in blocks.values()}
    places = {stack: _places(block for block in blocks.values() if block.stack == stack) for stack in stacks}
    found = dict.fromkeys(names, 0.0)
    for name, block in blocks.items():
        first, count = places[block.stack]
        if count > 1:
            found[name] = (first[block.stage] + block.number) / (count - 1)
    return found


def _places(blocks: Iterable[Block]) -> tuple[list[int], int]:
    """Of one stack: how many blocks come before each stage, and how many there are."""
    sizes: dict[int, int] = {}
    for block in blocks:
        sizes[block.stage] = max(sizes.get(block.stage, 1), block.number + 1)
    first = [0]
    for stage in range(max(sizes) + 1):
        first.append(first[-1] + sizes.get(stage, 1))
    return first[:-1], first[-1]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
