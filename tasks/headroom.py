"""Headroom: what to do when a training does not fit the memory of its device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from storage.errors import InvalidInput
from tasks.tuners.base import Training


@contextmanager
def advised_on_memory(tuner: Training, device: str) -> Iterator[None]:
    """Running out of memory, as an InvalidInput that says which settings of `tuner` take less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _advice(tuner, device) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator: " not in str(error):  # which has no exception of its own
            raise
        raise _advice(tuner, device) from error


def _advice(tuner: Training, device: str) -> InvalidInput:
    """What costs least first: the same steps in smaller parts, then other arithmetic, then fewer numbers that learn."""
    ways = []
    if tuner.batch > 1:
        ways.append(f"batch {tuner.batch // 2} with accumulate {tuner.accumulate * 2}")
    if not tuner.gradient_checkpointing:
        ways.append("gradient_checkpointing true")
    if tuner.precision == "float32":
        ways.append("precision bfloat16")
    if tuner.name == "full" and tuner.optimizer.name == "adamw":
        ways.append("optimizer {name: galore}")
    remedy = f"Set {', or '.join(ways)}" if ways else "Take a larger device"
    return InvalidInput(
        f"{device} ran out of memory in a training with tuner {tuner.name} at batch {tuner.batch}",
        remedy=remedy if tuner.name == "lora" else f"{remedy}; or tune with lora, which trains a few numbers alone",
    )
