"""Blocks: how deep in the network a parameter is, read from its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# What architectures keep their residual blocks in: ViT and CLIP, BERT, T5, Llama and Qwen, GPT-2, OpenCLIP
_CONTAINERS = "layers|layer|block|blocks|resblocks|h"
_BLOCK = re.compile(rf"^(?P<stack>(?:[^.]+\.)*?(?:{_CONTAINERS}))\.(?P<index>\d+)\.")


def block_of(name: str) -> tuple[str, int] | None:
    """The stack a parameter belongs to, and the number of its block in it; None outside of blocks.

    The outermost container decides: `encoder.block.7.layer.0.` of T5 is block 7, `layers.3.mlp.experts.0.` of a
    mixture of experts is block 3. Two towers, or encoder and decoder, are two stacks.
    """
    found = _BLOCK.match(name)
    return (found["stack"], int(found["index"])) if found else None


def depths(names: Iterable[str]) -> Mapping[str, float]:
    """(l - 1) / (L - 1) of every name: 0 in the first block of its stack and outside of blocks, 1 in the last."""
    blocks = {name: block_of(name) for name in names}
    last: dict[str, int] = {}
    for block in blocks.values():
        if block:
            last[block[0]] = max(last.get(block[0], 0), block[1])
    return {name: block[1] / last[block[0]] if block and last[block[0]] else 0.0 for name, block in blocks.items()}
