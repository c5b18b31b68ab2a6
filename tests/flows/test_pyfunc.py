"""Versions as mlflow.pyfunc loads them: weights from the store, no copy of them, no pickle, the model's own answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import numpy
import pandas
import pytest
import requests
import torch
from mlflow.artifacts import list_artifacts, load_text
from mlflow.tracking import MlflowClient

from flows.chain import chain
from flows.servers import LOOPBACK, free_port
from flows.workplace import here
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import InvalidInput
from storage.refs import CheckpointRef
from storage.registry_pyfunc import folder_of
from tasks.checkpoints import load_model
from tasks.data import Jsonl
from tasks.evaluate import evaluate, leading
from tasks.serving import LOADER, PARAMETERS, SETTINGS, rows_of
from tasks.suites import TextClassification
from tasks.suites.heads import LabelText
from tests.builders import ingested, tiny_model
from tests.flows.test_gated_chain import gated
from tests.tasks.tiny_tokenizer import save_tokenizer

TEXTS = ["one cat is red", "2 plus 3 is", "a photo of a dog"]


class Asked(NamedTuple):
    """A task as far as evaluation is concerned."""

    name: str
    suite: Any


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(DirectoryObjects(tmp_path / "store"))


def stored(architecture: str, folder: Path, store: ArtifactStore) -> CheckpointRef:
    save_tokenizer(folder)
    return ingested(tiny_model(architecture), folder, store)


def loaded(model: CheckpointRef, store: ArtifactStore, folder: Path, **settings: Any) -> Any:
    folder.mkdir()
    scores = settings.pop("scores", None)
    rows = rows_of(store.open(model))
    for name, content in folder_of(model, store.url, LOADER, SETTINGS, PARAMETERS, scores, rows).items():
        (folder / name).write_bytes(content)
    return mlflow.pyfunc.load_model(str(folder), model_config=settings or None)


@pytest.mark.usefixtures("prefect_server", "home")
def test_the_champion_of_a_chain_is_loaded_from_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    config = gated(of_alone=None)
    (line,) = chain(config).lines
    tracking = here().settings.tracking
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    served = mlflow.pyfunc.load_model(f"models:/{line.name}@champion")
    with here().registry.champions(line.name) as champions:
        number = champions.version("champion")
    step = next(one for one in line.steps if one.version.version == number)
    pixels = numpy.random.default_rng(0).random((5, 1, 8, 8), dtype=numpy.float32)
    backbone: Any = load_model(here().store.open(step.model, "checkpoint"))
    with torch.no_grad():
        expected = backbone(pixel_values=torch.from_numpy(pixels)).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(torch.from_numpy(served.predict(pixels)), expected)
    told = leading(here().store.open(step.scores))
    for task in config.tasks[: len(told)]:
        rows = task.suite.open(here().store.open(step.entry.base, "checkpoint")).rows("test")
        images = numpy.stack([rows[n]["pixel_values"].numpy() for n in range(len(rows))])
        found = served.predict(images, params={"task": task.name})
        right = [one["label"] == str(int(rows[n]["label"])) for n, one in enumerate(found)]
        assert sum(right) / len(right) == pytest.approx(told[task.name], abs=1e-12), "what the version's scores say"
    with pytest.raises(InvalidInput, match=r"no task 'none'.*measured on invert, permute, rot90"):
        served.predict(pixels, params={"task": "none"})
    version = MlflowClient(tracking).get_model_version_by_alias(line.name, "champion")
    assert version.tags["weights"] == here().store.address(step.model)
    assert step.model in here().registry.refs()
    files = {one.path: one.file_size for one in list_artifacts(version.source)}
    files.pop("model/registered_model_meta", None)  # MLflow notes there which version it loaded
    examples = {"model/input_example.json", "model/serving_input_example.json"}
    assert set(files) == {"model/MLmodel", "model/weights.json", *examples}
    assert sum(files.values()) < 6000, "no weights"


def test_a_classifier_gives_labels_and_probabilities(tmp_path: Path, store: ArtifactStore) -> None:
    model = stored("BertForSequenceClassification", tmp_path / "bert", store)
    served = loaded(model, store, tmp_path / "model", batch=2)
    found = served.predict(TEXTS)
    assert found == served.predict(pandas.DataFrame({"text": TEXTS})) == served.predict(numpy.array(TEXTS))
    assert [list(one["scores"]) for one in found] == [["LABEL_0", "LABEL_1", "LABEL_2"]] * 3
    assert all(one["score"] == max(one["scores"].values()) == one["scores"][one["label"]] for one in found)
    assert [sum(one["scores"].values()) for one in found] == pytest.approx([1.0] * 3)
    with pytest.raises(InvalidInput, match=r"row 1 given to checkpoint/.* expected a text, found int"):
        served.predict(["a cat", 3])
    with pytest.raises(InvalidInput, match="table of 2 columns"):
        served.predict(pandas.DataFrame({"text": TEXTS, "other": TEXTS}))


def test_a_classifier_of_images_gives_labels(tmp_path: Path, store: ArtifactStore) -> None:
    model = stored("ViTForImageClassification", tmp_path / "vit", store)
    size = json.loads(store.open(model).asset("config.json"))
    shape = (3, size["num_channels"], size["image_size"], size["image_size"])
    pixels = numpy.random.default_rng(0).random(shape, dtype=numpy.float32)
    served = loaded(model, store, tmp_path / "model")
    found = served.predict(pixels)
    backbone: Any = load_model(store.open(model, "checkpoint"))
    with torch.no_grad():
        expected = backbone(pixel_values=torch.from_numpy(pixels)).logits.argmax(dim=1).tolist()
    assert [one["label"] for one in found] == [f"LABEL_{number}" for number in expected]
    with pytest.raises(InvalidInput, match="not measured on any"):
        served.predict(pixels, params={"task": "rot90"})


def test_a_head_that_a_suite_makes_answers_for_its_task(tmp_path: Path, store: ArtifactStore) -> None:
    """Zero-shot vectors of label names, and pairs of texts; from the server's JSON these are lists."""
    model = stored("BertForMaskedLM", tmp_path / "bert", store)
    rows = [{"a": text, "b": TEXTS[0], "label": ("cat", "dog")[n % 2]} for n, text in enumerate(TEXTS * 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Jsonl(train=(str(tmp_path / "rows.jsonl"),), test=(str(tmp_path / "rows.jsonl"),))
    suite = TextClassification(data, LabelText(), text="a", pair="b", labels=("cat", "dog"))
    scores = evaluate(model, [Asked("pets", suite)], store)
    served = loaded(model, store, tmp_path / "model", scores=scores, task="pets")
    found = served.predict([[row["a"], row["b"]] for row in rows])
    assert list(found[0]["scores"]) == ["cat", "dog"]
    right = [one["label"] == row["label"] for one, row in zip(found, rows, strict=True)]
    assert sum(right) / len(right) == leading(store.open(scores))["pets"]
    with pytest.raises(InvalidInput, match="row 0: expected text and pair, found 'one cat is red'"):
        served.predict(TEXTS)


def test_a_language_model_writes_on(tmp_path: Path, store: ArtifactStore) -> None:
    model = stored("LlamaForCausalLM", tmp_path / "llama", store)
    found = loaded(model, store, tmp_path / "model", max_new_tokens=4).predict(TEXTS)
    alone = [loaded(model, store, tmp_path / str(n), max_new_tokens=4).predict([text]) for n, text in enumerate(TEXTS)]
    assert [[one] for one in found] == alone, "padding changes nothing"
    assert all(isinstance(one, str) for one in found)


def test_an_encoder_gives_features(tmp_path: Path, store: ArtifactStore) -> None:
    model = stored("BertForMaskedLM", tmp_path / "bert", store)
    found = loaded(model, store, tmp_path / "model").predict(TEXTS)
    assert found.shape == (3, 32) and numpy.isfinite(found).all()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_mlflow_serves_the_champion(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = chain(gated(of_alone=None)).lines
    monkeypatch.setenv("MLFLOW_TRACKING_URI", here().settings.tracking)
    here_first = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", here_first)  # as in an environment that is activated: MLflow looks for uvicorn
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{line.name}@champion"]
    command += ["--env-manager", "local", "-h", LOOPBACK, "-p", str(port)]
    server = subprocess.Popen(command, start_new_session=True)
    try:
        url, deadline = f"http://{LOOPBACK}:{port}", time.monotonic() + 120
        while not _answers(f"{url}/ping"):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        pixels = numpy.random.default_rng(0).random((2, 1, 8, 8), dtype=numpy.float32)
        answer = requests.post(f"{url}/invocations", json={"inputs": pixels.tolist()}, timeout=60)
        assert answer.status_code == 200, answer.text
        found = numpy.array(json.loads(answer.text)["predictions"], dtype=numpy.float32)
        wrong = requests.post(f"{url}/invocations", json={"inputs": [[0.5]]}, timeout=60)
        assert wrong.status_code == 400 and "does not match expected shape (-1, 1, 8, 8)" in wrong.json()["message"]
        asked = {"inputs": pixels.tolist(), "params": {"task": "none"}}
        assert "no task 'none'" in requests.post(f"{url}/invocations", json=asked, timeout=60).json()["message"]
        expected = mlflow.pyfunc.load_model(f"models:/{line.name}@champion").predict(pixels)
        numpy.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        asked = {"inputs": pixels.tolist(), "params": {"task": line.steps[0].entry.task}}
        (one, _) = json.loads(requests.post(f"{url}/invocations", json=asked, timeout=60).text)["predictions"]
        assert one["score"] == max(one["scores"].values()) == one["scores"][one["label"]]
        with here().registry.champions(line.name) as champions:
            number = champions.version("champion")
        source = MlflowClient().get_model_version_download_uri(line.name, str(number))
        example = load_text(f"{source}/serving_input_example.json")
        headers = {"Content-Type": "application/json"}
        assert requests.post(f"{url}/invocations", data=example, headers=headers, timeout=60).ok, "as it is shown"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False
