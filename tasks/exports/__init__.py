"""Exports: a stored update in forms that other programs read. One file per form.

    checkpoint   base + update as a Hugging Face folder, for `from_pretrained`
    delta        the dense task vector, a tensor per parameter
    patch        positions and new values of what changed, for servers that take weight updates
    lora         low-rank factors, for peft

All of them read the update through `Applied`, write into a folder that appears whole or not at all, and return an
`Exported` that says what was lost, if anything was.
"""

from __future__ import annotations

from tasks.exports.applied import Applied, Exported, open_applied
from tasks.exports.dense import export_checkpoint, export_delta
from tasks.exports.factors import LoraForm
from tasks.exports.lora import export_lora
from tasks.exports.patch import export_patch

__all__ = [
    "Applied",
    "Exported",
    "LoraForm",
    "export_checkpoint",
    "export_delta",
    "export_lora",
    "export_patch",
    "open_applied",
]
