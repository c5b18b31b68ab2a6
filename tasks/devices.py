"""Devices: whether there is what a training asks for, asked before anything is loaded; and what a GPU needs first."""

from __future__ import annotations

import threading

import torch

from storage.errors import InvalidInput

_FIRST = threading.Lock()
_with_linalg: set[torch.device] = set()


def load_linalg(device: torch.device) -> None:
    """Have torch load its linear algebra for this device, before many threads ask for some of it.

    It loads it at the first call, and fails if two threads are the first at once: "lazy wrapper should be called at
    most once" (PyTorch issue 90613).
    """
    if device.type == "cpu" or device in _with_linalg:
        return
    with _FIRST:
        if device not in _with_linalg:
            torch.linalg.eigh(torch.eye(2, device=device))
            _with_linalg.add(device)


def require_device(device: str) -> None:
    """Refuse a GPU that torch does not see."""
    wanted = torch.device(device)
    if wanted.type != "cuda":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise InvalidInput(
            f"the device is {device!r}, but torch {torch.__version__} sees no GPU",
            remedy="Install a CUDA build of torch that fits the driver, or set DELTAWORKS_DEVICE=cpu",
        )
    if (wanted.index or 0) >= count:
        raise InvalidInput(f"the device is {device!r}, but torch sees {count} GPU(s), numbered from 0")


def require_trainable(device: str, precision: str, processes: int = 1) -> None:
    """Refuse what the Trainer cannot do on this device, in this precision, in so many processes."""
    require_device(device)
    wanted = torch.device(device)
    if wanted.type == "cuda" and wanted.index:
        raise InvalidInput(
            f"a training takes the first GPU that it sees, not {device!r}",
            remedy=f"Set CUDA_VISIBLE_DEVICES={wanted.index} and DELTAWORKS_DEVICE=cuda",
        )
    if wanted.type == "cuda" and processes > torch.cuda.device_count():
        raise InvalidInput(
            f"processes is {processes}, a GPU each, but torch sees {torch.cuda.device_count()}",
            remedy="Lower processes, or show more GPUs in CUDA_VISIBLE_DEVICES",
        )
    if precision == "float16" and wanted.type != "cuda":
        raise InvalidInput(
            f"precision float16 needs a CUDA GPU, and the device is {device!r}",
            remedy="Set precision to bfloat16 or float32",
        )
    if precision == "bfloat16" and wanted.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise InvalidInput(
            f"{torch.cuda.get_device_name(wanted)} has no bfloat16 arithmetic",
            remedy="Set precision to float16 or float32",
        )
