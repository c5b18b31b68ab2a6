"""The presets for local files, run as they are on tiny models: only the length of the trainings is another."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from configs.chain import load_chain
from flows.chain import chain
from flows.workplace import here
from tests.tasks.tiny_tokenizer import BOS, EOS, IDS, save_tokenizer

pytestmark = pytest.mark.usefixtures("prefect_server")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": len(IDS), "bos_token_id": BOS, "eos_token_id": EOS}


def stage(home: Path, step: str) -> Any:
    """The MLflow run of a step of the only line."""
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    found = [one for one in client.search_experiments() if one.name != "Default"]
    (run,) = client.search_runs([one.experiment_id for one in found], f"tags.stage = '{step}'")
    return client, run


def test_a_language_model_on_a_file_of_json_lines(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=64, initializer_range=0.2, **SIZES, **TOKENS)
    LlamaForCausalLM(config).save_pretrained("models/base")
    save_tokenizer(Path("models/base"))
    Path("data").mkdir()
    chats = [
        [{"role": "user", "content": f"{n} plus {m}"}, {"role": "assistant", "content": f"is {n + m}"}]
        for n in range(10)
        for m in range(10)
    ]
    Path("data/chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))

    preset = load_chain("chat-jsonl")
    tuner = replace(preset.tuner, steps=40, batch=16, learning_rate=2e-2, validate_every=10)
    outcome = chain(replace(preset, tuner=tuner))

    store = here().store
    facts = store.open(outcome.prepared[0].tuned).manifest.facts
    rows = preset.tasks[0].suite.data.rows("train")
    assert facts["examples"] == len(rows) < 100
    assert facts["best_validation_loss"] < 1.5
    client, run = stage(home, "fine_tune")
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.digest == preset.tasks[0].suite.fingerprint()[:36]
    assert run.data.params["suite.data.holdout"] == "0.1"
    curve = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "validation_loss")]
    assert min(value for _, value in curve) == facts["best_validation_loss"]
    assert dict(curve)[facts["best_step"]] == facts["best_validation_loss"]
    losses = [point.value for point in client.get_metric_history(run.info.run_id, "training_loss")]
    assert len(losses) == 10 and losses[-1] < losses[0] / 2


def png(shade: int, generator: torch.Generator) -> bytes:
    pixels = torch.randint(0, 60, (36, 40, 3), dtype=torch.uint8, generator=generator) + shade
    written = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(written, format="PNG")
    return written.getvalue()


def test_a_clip_tower_on_images_in_parquet(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    text = {"max_position_embeddings": 77, **TOKENS, **SIZES}
    vision = {"image_size": 32, "patch_size": 16, **SIZES}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained("models/clip")
    save_tokenizer(Path("models/clip"), chat=None, ends=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained("models/clip")
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained("models/clip")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**sizes).save_pretrained("models/clip")
    generator = torch.Generator().manual_seed(2)
    rows = [
        {"image": {"bytes": png(190 * (n % 2), generator), "path": None}, "label": ("cat", "dog")[n % 2]}
        for n in range(120)
    ]
    Path("data").mkdir()
    for part in range(2):
        pq.write_table(pa.Table.from_pylist(rows[part::2] + rows[1 - part :: 2][:10]), f"data/images-{part}.parquet")

    preset = load_chain("clip-parquet")
    outcome = chain(replace(preset, tuner=replace(preset.tuner, steps=30, batch=16, learning_rate=2e-3)))
    _, run = stage(home, "fine_tune")
    assert run.inputs.dataset_inputs[0].dataset.source_type == "deltaworks parquet"
    evaluated = stage(home, "evaluate")[1]
    assert evaluated.data.metrics["pets"] > 0.9
    assert outcome.lines[0].last.model
