"""What versions take and where their weights come from: examples and schemas, images as files, buckets, copies."""

from __future__ import annotations

import base64
import io
import json
import logging
import shutil
from pathlib import Path

import mlflow
import numpy
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from PIL import Image
from transformers import ViTImageProcessor

from flows.servers import LOOPBACK, free_port
from storage.address import open_objects
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import InvalidInput, Missing, Unavailable
from storage.lines import Line
from storage.registry import Registry
from tasks.data import Jsonl
from tasks.evaluate import evaluate
from tasks.extract import Extract, extract_update
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import TaskArithmetic
from tasks.recipe import Recipe
from tasks.register import register
from tasks.serving import SETTINGS, Served
from tasks.suites import TextClassification
from tasks.suites.heads import LabelText
from tests.builders import ingested, perturbed, tiny_model
from tests.flows.test_pyfunc import TEXTS, Asked, loaded, stored


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(DirectoryObjects(tmp_path / "store"))


def test_a_server_is_told_pairs_and_texts_apart(tmp_path: Path, store: ArtifactStore) -> None:
    """What MLflow's server makes of JSON without a schema: arrays of as many dimensions as the lists have."""
    model = stored("BertForMaskedLM", tmp_path / "bert", store)
    rows = [{"a": text, "b": TEXTS[0], "label": ("cat", "dog")[n % 2]} for n, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Jsonl(train=(str(tmp_path / "rows.jsonl"),), test=(str(tmp_path / "rows.jsonl"),))
    suite = TextClassification(data, LabelText(), text="a", pair="b", labels=("cat", "dog"))
    served = loaded(model, store, tmp_path / "model", scores=evaluate(model, [Asked("pets", suite)], store))
    pairs = [[row["a"], row["b"]] for row in rows]
    asked = {"task": "pets"}
    assert served.predict(numpy.array(pairs), params=asked) == served.predict(pairs, params=asked)
    assert len(served.predict(numpy.array(TEXTS).reshape(-1, 1))) == len(TEXTS)


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "LlamaForCausalLM", "ViTModel", "CLIPVisionModel"])
def test_mlflow_knows_an_example_of_what_a_model_takes(architecture: str, tmp_path: Path, store: ArtifactStore) -> None:
    model = stored(architecture, tmp_path / "saved", store)
    served = loaded(model, store, tmp_path / "model", max_new_tokens=2)
    described = Model.load(str(tmp_path / "model"))
    example = described.load_input_example(str(tmp_path / "model"))
    assert len(served.predict(example)) == len(example)
    request = json.loads(described.get_serving_input(str(tmp_path / "model")))
    assert numpy.array(request["inputs"]).tolist() == numpy.asarray(example).tolist()
    inputs = described.get_input_schema()
    if architecture in ("ViTModel", "CLIPVisionModel"):
        assert inputs.inputs[0].shape == (-1, 3, 8, 8)
        with pytest.raises(MlflowException, match="does not match expected shape"):
            served.predict(numpy.zeros((1, 3, 4, 4), dtype=numpy.float32))
    else:
        assert inputs is None, "a schema of one column would drop the second text of a pair"


def test_images_are_taken_as_files_where_there_is_a_processor(tmp_path: Path, store: ArtifactStore) -> None:
    folder = tmp_path / "vit"
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    model = stored("ViTForImageClassification", folder, store)
    served = loaded(model, store, tmp_path / "model", batch=2)
    drawn = numpy.random.default_rng(0).integers(0, 256, (20, 12, 3), dtype=numpy.uint8)
    image, file = Image.fromarray(drawn), io.BytesIO()
    image.save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    pixels = ViTImageProcessor.from_pretrained(folder)(image, return_tensors="np")["pixel_values"]
    (expected,) = served.predict(pixels)
    shown = [image, file.getvalue(), text, f"data:image/png;base64,{text}", pixels[0]]
    assert [one["label"] for one in served.predict(shown)] == [expected["label"]] * 5
    assert [one["score"] for one in served.predict(shown)] == pytest.approx([expected["score"]] * 5)
    example = Model.load(str(tmp_path / "model")).load_input_example(str(tmp_path / "model"))
    assert len(served.predict(numpy.array(example))) == len(example) == 1
    for wrong, said in (
        ([text, "no base64!"], "row 1: expected an image, found a text that is no base64"),
        ([b"no image"], "row 0: the bytes are no image"),
        (pixels[0], r"row 0: expected pixel values \[C, H, W\], found \[8, 8\]"),
        ([pixels[0], pixels[0][:, :4]], r"row 1: expected \[3, 8, 8\] as row 0, found \[3, 4, 8\]"),
        (pixels[:, :, :4], r"images given to .*: expected \[3, 8, 8\], found \[3, 4, 8\]"),
        ([{"a": 1}], "row 0: expected pixel values"),
    ):
        with pytest.raises(InvalidInput, match=said):
            served.predict(wrong)
    bare = stored("ViTModel", tmp_path / "bare", store)
    with pytest.raises(InvalidInput, match="no image processor"):
        Served(store.open(bare), SETTINGS).predict([text])


def test_weights_come_from_s3_with_the_credentials_of_the_environment(
    tmp_path: Path,
    s3_url: str,
    s3_environment: dict[str, str],
    tables: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A version of a line whose store is a bucket; no key of the environment is written anywhere."""
    caplog.set_level(logging.INFO)
    store = ArtifactStore(open_objects(s3_url))
    base = stored("BertForMaskedLM", tmp_path / "bert", store)
    tuned = ingested(perturbed(tiny_model("BertForMaskedLM")), tmp_path / "tuned", store)
    recipe = Recipe(TaskArithmetic(scale=1.0))
    update = extract_update(base, tuned, Extract(), store)
    state = fold_update(base, None, update, recipe, store)
    journal = Line(store.objects, "remote")
    entry = journal.fold(journal.open(base, recipe.spec()), "first", update, state)
    shutil.copy(tables, tmp_path / "mlflow.db")
    tracking = f"sqlite:///{tmp_path / 'mlflow.db'}"
    registry = Registry(tracking, tmp_path / "artifacts")
    model = materialize(base, state, store)
    made = register("remote", "remote", [entry], model, None, None, store, registry)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking)
    address = f"models:/remote/{made.version}"
    found = mlflow.pyfunc.load_model(address).predict(TEXTS)
    numpy.testing.assert_array_equal(found, Served(store.open(model), SETTINGS).predict(TEXTS))

    secret = s3_environment["AWS_SECRET_ACCESS_KEY"]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]  # the database with its tags too
    assert any(s3_url.encode() in one for one in written)
    assert not any(secret.encode() in one for one in written)
    assert secret not in caplog.text

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(InvalidInput, match=r"weights of this version.*SignatureDoesNotMatch") as refused:
            mlflow.pyfunc.load_model(address)
        assert "AWS_ENDPOINT_URL" in refused.value.remedy and secret not in str(refused.value)
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # a machine without a role of its own
        with pytest.raises(InvalidInput, match=r"cannot be read: .*Unable to locate credentials"):
            mlflow.pyfunc.load_model(address)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{LOOPBACK}:{free_port()}")
        with pytest.raises(Unavailable, match=r"cannot be read: .*Could not connect"):
            mlflow.pyfunc.load_model(address)


def test_weights_come_from_a_copy_where_the_store_is_not(tmp_path: Path, store: ArtifactStore) -> None:
    model = stored("BertForMaskedLM", tmp_path / "bert", store)
    served = loaded(model, store, tmp_path / "model")
    shutil.move(tmp_path / "store", tmp_path / "copy")
    with pytest.raises(Missing, match=r"weights of this version, checkpoint/.* It is a folder of the machine"):
        mlflow.pyfunc.load_model(str(tmp_path / "model"))
    found = mlflow.pyfunc.load_model(str(tmp_path / "model"), model_config={"store": str(tmp_path / "copy")})
    numpy.testing.assert_array_equal(found.predict(TEXTS), served.predict(TEXTS))
