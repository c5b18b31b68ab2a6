"""Builders: what tests are made of: stores in memory, tiny models of each form, checkpoints and updates."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from storage.artifacts import ArtifactStore
from storage.manifest import Lineage
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef, UpdateRef
from tasks.ingest import Checkpoint, ingest
from tasks.tensors import dtype_name

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
_TEXT = {"vocab_size": 64, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_IMAGE = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 2}
_BERT = {**_TEXT, "num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# One model of each form of file: tied weights, renamed tensors, a conv stem and bare parameters, fused experts, Conv1D.
_CONFIGS = {
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(
        **_TEXT, **_SIZES, num_hidden_layers=1, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "BertForMaskedLM": lambda: transformers.BertConfig(**_BERT, **_SIZES),
    "BertForSequenceClassification": lambda: transformers.BertConfig(**_BERT, **_SIZES, num_labels=3),
    "ViTForImageClassification": lambda: transformers.ViTConfig(**_IMAGE, **_SIZES, num_labels=3),
    "ViTModel": lambda: transformers.ViTConfig(**_IMAGE, **_SIZES),
    "CLIPVisionModel": lambda: transformers.CLIPVisionConfig(**_IMAGE, **_SIZES),
    "MixtralForCausalLM": lambda: transformers.MixtralConfig(
        **_TEXT, **_SIZES, num_hidden_layers=1, num_key_value_heads=2, num_local_experts=3
    ),
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1
    ),
}
FORMS = [name for name in _CONFIGS if not name.endswith("Classification")]


def memory_store() -> ArtifactStore:
    return ArtifactStore(MemoryObjects())


def tiny_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A random model of `architecture`; every parameter is drawn, so that no two of one shape are equal."""
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, architecture)(_CONFIGS[architecture]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05, generator=generator)
    return model.eval()


def perturbed(model: PreTrainedModel, seed: int = 1, size: float = 0.01) -> PreTrainedModel:
    """A copy of `model` as if it had been tuned: noise of standard deviation `size` on every parameter."""
    generator = torch.Generator().manual_seed(seed)
    tuned = deepcopy(model)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return tuned


def ingested(model: PreTrainedModel, folder: Path, store: ArtifactStore) -> CheckpointRef:
    """`model` saved to `folder` as transformers saves it, and read into `store`."""
    model.save_pretrained(folder)
    return ingest(Checkpoint(source=str(folder)), store)


def role_of(name: str, tensor: Tensor) -> str:
    """The role a parameter would have in a model: matrices called weight are linear, vectors belong to a norm."""
    leaf = name.rpartition(".")[2]
    if "." not in name:
        return "bare"
    return f"{'embedding' if 'embed' in name else 'linear' if tensor.ndim == 2 else 'norm'}.{leaf}"


def checkpoint_of(tensors: Mapping[str, Tensor], store: ArtifactStore) -> CheckpointRef:
    """A checkpoint of just these tensors, without a model around them."""
    draft = store.draft("checkpoint", Lineage("ingest"))
    for name, tensor in tensors.items():
        dtype = dtype_name(tensor.dtype)
        draft.add(name, {"tensor": tensor}, role=role_of(name, tensor), dtype=dtype, shape=tensor.shape)
    return CheckpointRef(draft.commit())


def update_of(deltas: Mapping[str, Tensor], base: CheckpointRef, store: ArtifactStore) -> UpdateRef:
    """A dense update of `base`."""
    draft = store.draft("update", Lineage("extract", {"base": base}))
    for name, delta in deltas.items():
        dtype = dtype_name(delta.dtype)
        draft.add(name, {"tensor": delta}, role=role_of(name, delta), dtype=dtype, shape=delta.shape)
    return UpdateRef(draft.commit())


def random_tensors(seed: int, size: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors of one small model: two matrices, an embedding, vectors, and a bare parameter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "class_token": (8,),
        "embed.weight": (12, 8),
        "layer.bias": (16,),
        "layer.weight": (16, 8),
        "out.weight": (8, 16),
    }
    return {name: (torch.randn(shape, generator=generator) * size).to(dtype) for name, shape in shapes.items()}
