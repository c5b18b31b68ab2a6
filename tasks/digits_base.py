"""The base model of the demo: a small vision transformer trained on the spot, because no download is needed for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from storage.artifacts import ArtifactStore
from storage.manifest import Lineage
from storage.refs import CheckpointRef
from tasks.checkpoints import CONFIG, config_of, write_checkpoint
from tasks.choice import Choice, require
from tasks.data import Digits, Rows, Split
from tasks.exclusive import PROCESS_STATE
from tasks.parallel import Report
from tasks.suites.base import Batch
from tasks.tuners.full import Full

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCALE = 10.0


@dataclass(frozen=True)
class DigitsBase(Choice):
    """A ViT of two layers (patches of 4 x 4 pixels) that learned the digits in all seven views at once.

    It is trained with one shared head that is thrown away, so it knows the views but none of the tasks' heads.
    """

    name: Literal["digits_base"] = "digits_base"
    version: Literal[1] = 1
    width: int = 96
    steps: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.width >= 16 and self.width % 16 == 0, "width", "a multiple of 16", self.width)
        require(self.steps > 0, "steps", "positive", self.steps)


def train_digits_base(
    spec: DigitsBase,
    store: ArtifactStore,
    device: str = "cpu",
    report: Report = lambda done, total, note: None,
) -> CheckpointRef:
    """Train the demo's base from random weights and store it."""
    # they take seconds to import, and who reads a chain needs only the settings above
    from transformers import ViTConfig, ViTModel, set_seed

    from tasks.fine_tune import train
    from tasks.naming import Skeleton

    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=spec.width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * spec.width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        architectures=["ViTModel"],
    )
    problem = _Mixed(Digits(view="mixed", seed=spec.seed))
    tuner = Full(weights="all", steps=spec.steps, learning_rate=1e-3, seed=spec.seed)
    with PROCESS_STATE, torch.random.fork_rng():
        set_seed(spec.seed)
        backbone = ViTModel(config)
        train(problem.wrap(backbone), problem, tuner, device, report)
    config.dtype = torch.float32
    skeleton = Skeleton(config.to_json_string().encode())
    tensors = ((name, backbone.get_parameter(slot.memory).detach()) for name, slot in skeleton.slots.items())
    assets = {CONFIG: config_of(skeleton)}
    lineage = Lineage("digits_base", spec={**spec.spec(), "data": problem.data.fingerprint()})
    return write_checkpoint(store, skeleton, tensors, assets, lineage, where="the digits base")


class _Mixed:
    """All views with one trainable head of unit rows."""

    def __init__(self, data: Digits) -> None:
        self.data = data

    def rows(self, split: Split) -> Rows:
        return self.data.rows(split)

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        labels = torch.tensor([row["label"] for row in rows])
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}

    def counted(self, batch: Batch) -> int:
        return len(batch["labels"])

    def wrap(self, backbone: PreTrainedModel) -> nn.Module:
        return _SharedHead(backbone)


class _SharedHead(nn.Module):
    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone
        self.weight = nn.Parameter(functional.normalize(torch.randn(10, backbone.config.hidden_size), dim=-1))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        feature_BD = self.backbone(pixel_values=pixel_values).last_hidden_state[:, 0]
        logits_BC = _SCALE * functional.normalize(feature_BD, dim=-1) @ self.weight.T
        return {"loss": functional.cross_entropy(logits_BC, labels), "logits": logits_BC}
