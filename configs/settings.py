"""Where things are and what they run on: settings from the environment, with embedded defaults.

Nothing here is part of a result: the same chain with other settings gives the same refs (up to the last bits of
floating point between devices and thread counts).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from storage.errors import InvalidInput
from tasks.parallel import Budget, parse_bytes


@dataclass(frozen=True)
class Settings:
    """
    home:     folder of the embedded store, databases and logs            DELTAWORKS_HOME        .deltaworks
    store:    address of the artifact store, file:///... or s3://...      DELTAWORKS_STORE       <home>/store
    tracking: MLflow tracking address                                     MLFLOW_TRACKING_URI    sqlite in <home>
    device:   cpu, cuda, cuda:1 ...                                       DELTAWORKS_DEVICE      cuda if there
    threads:  of torch on the CPU, in training and evaluation; 1 is       DELTAWORKS_THREADS     1
              fastest for small models, and trainings are bit-identical
              only between equal numbers
    budget:   how many tensors are worked on at once (results do not      DELTAWORKS_WORKERS     cores, up to 16
              depend on it), and the memory they may take together        DELTAWORKS_MEMORY      4GiB
    cache:    folder for copies of what is read from an s3:// store,      DELTAWORKS_CACHE       none
              and how much it may hold                                    DELTAWORKS_CACHE_SIZE  20GiB
    """

    home: Path
    store: str
    tracking: str
    device: str
    threads: int
    budget: Budget = field(default_factory=Budget)
    cache: Path | None = None
    cache_size: int = 20 * 2**30

    @classmethod
    def from_environment(cls) -> Settings:
        home = Path(os.environ.get("DELTAWORKS_HOME", ".deltaworks")).expanduser().absolute()
        return cls(
            home=home,
            store=os.environ.get("DELTAWORKS_STORE") or (home / "store").as_uri(),
            tracking=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}",
            device=_device(os.environ.get("DELTAWORKS_DEVICE")),
            threads=_count("DELTAWORKS_THREADS", 1),
            budget=Budget(
                workers=_count("DELTAWORKS_WORKERS", Budget().workers),
                memory=parse_bytes(os.environ.get("DELTAWORKS_MEMORY", "4GiB")),
            ),
            cache=Path(cache) if (cache := os.environ.get("DELTAWORKS_CACHE")) else None,
            cache_size=parse_bytes(os.environ.get("DELTAWORKS_CACHE_SIZE", "20GiB")),
        )


def _count(name: str, default: int) -> int:
    found = os.environ.get(name, str(default))
    if not found.isdecimal() or int(found) == 0:
        raise InvalidInput(f"{name} must be a positive whole number, found {found!r}")
    return int(found)


def _device(wanted: str | None) -> str:
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(wanted).type
    except RuntimeError:
        raise InvalidInput(f"DELTAWORKS_DEVICE must be cpu, cuda or cuda:<number>, found {wanted!r}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(
            f"DELTAWORKS_DEVICE is {wanted!r}, but torch {torch.__version__} sees no GPU",
            remedy="Install a CUDA build of torch (see the README), or unset DELTAWORKS_DEVICE to run on the CPU",
        )
    return wanted
