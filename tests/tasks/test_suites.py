"""Image classification and its heads, on a tiny random CLIP: against CLIP's own forward."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.objects import MemoryObjects
from storage.refs import CheckpointRef
from tasks.checkpoints import load_model
from tasks.data import Digits, Parquet, Split
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.evaluate import evaluate, read_scores
from tasks.ingest import Checkpoint, ingest
from tasks.suites import ImageClassification
from tasks.suites.base import Problem
from tasks.suites.heads import ClassMeans, ClipText, Orthonormal
from tasks.suites.image_classification import ImageProblem
from tests.tasks.tiny_tokenizer import BOS, EOS, IDS, ids, quiet, save_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def store() -> ArtifactStore:
    return ArtifactStore(MemoryObjects())


@pytest.fixture(scope="module")
def digits_base(store: ArtifactStore) -> CheckpointRef:
    return train_digits_base(DigitsBase(width=32, steps=200), store)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": len(IDS), "max_position_embeddings": 77, "bos_token_id": BOS, "eos_token_id": EOS, **sizes}
    vision = {"image_size": 32, "patch_size": 16, **sizes}
    torch.manual_seed(1)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():  # as it is made, its features hardly differ: give the test some contrast
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() else 0)
    model.save_pretrained(folder)
    save_clip_tokenizer(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_clip_tokenizer(folder: Path) -> None:
    """CLIP reads its text feature at the end-of-text token, so texts must have one; it also stands for padding."""
    save_tokenizer(folder, chat=None, ends=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(folder)


NAMES = ("cat", "dog", "red cat", "blue dog")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Parquet:
    """Noise of odd sizes as PNG, in the form the hub's Parquet files have."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(2)

    def png(number: int) -> bytes:
        pixels = torch.randint(0, 256, (34 + number, 41, 3), dtype=torch.uint8, generator=generator)
        written = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(written, format="PNG")
        return written.getvalue()

    rows = [{"image": {"bytes": png(n), "path": None}, "label": n % len(NAMES)} for n in range(12)]
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return Parquet(train=(str(folder / "train.parquet"),), test=(str(folder / "test.parquet"),))


def zero_shot(clip_folder: Path, images: Parquet, texts: list[str]) -> torch.Tensor:
    """Logits of the whole CLIP model, by its own forward, one image and one text at a time."""
    from PIL import Image

    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    logits = []
    for row in images.rows("test"):
        pixels = processor(Image.open(io.BytesIO(row["image"]["bytes"])), return_tensors="pt")["pixel_values"]
        found = []
        for text in texts:
            tokens = torch.tensor([[BOS, *ids(text), EOS]])
            with torch.no_grad():
                found.append(model(input_ids=tokens, pixel_values=pixels).logits_per_image[0, 0])
        logits.append(torch.stack(found))
    return torch.stack(logits)


def vision(clip_folder: Path, store: ArtifactStore) -> CheckpointRef:
    return ingest(Checkpoint(source=str(clip_folder), architecture="CLIPVisionModel"), store)


def test_clip_text_head_gives_clips_own_zero_shot_logits(
    clip_folder: Path, images: Parquet, store: ArtifactStore
) -> None:
    base = vision(clip_folder, store)
    head = ClipText(source=str(clip_folder), classes=NAMES, templates=("a photo of a {}",))
    problem = ImageClassification(images, head, feature="pooled").open(store.open(base, "checkpoint"))
    backbone = load_model(store.open(base, "checkpoint"))
    with torch.no_grad():
        found = problem.wrap(backbone).eval()(**problem.collate(list(problem.rows("test"))))
    expected = zero_shot(clip_folder, images, [f"a photo of a {name}" for name in NAMES])
    assert expected.std() > 0.1, "a test on equal logits would prove nothing"
    # float32 of other batch sizes; logits are scaled by exp(logit_scale) = 14.3
    torch.testing.assert_close(found["logits"], expected, atol=1e-5, rtol=1e-5)
    labels = torch.tensor([row["label"] for row in images.rows("test")])
    assert float(found["loss"]) == pytest.approx(float(functional.cross_entropy(expected, labels)), abs=1e-5)
    score, *_ = problem.score(backbone, "cpu", quiet)
    assert (score.metric, score.samples) == ("accuracy", 12)
    assert score.value == pytest.approx(float((expected.argmax(dim=1) == labels).float().mean()))


def test_clip_text_head_averages_normalised_templates(clip_folder: Path, images: Parquet) -> None:
    templates = ("a photo of a {}", "{}", "of {} a")
    head = ClipText(source=str(clip_folder), classes=NAMES, templates=templates).build(32)
    single = [ClipText(source=str(clip_folder), classes=NAMES, templates=(one,)).build(32).weight for one in templates]
    mean = torch.stack(single).mean(dim=0)
    torch.testing.assert_close(head.weight, mean / mean.norm(dim=1, keepdim=True))
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_class_names_from_data(clip_folder: Path, images: Parquet) -> None:
    given = ClipText(source=str(clip_folder), classes=NAMES)
    from_data = ClipText(source=str(clip_folder), classes="from_data")
    assert torch.equal(from_data.build(32, NAMES).weight, given.build(32).weight)
    with pytest.raises(InvalidInput, match=r"the data gives its labels no names\. List the class names"):
        from_data.build(32, images.class_names("label"))


def test_bad_clip_sources_are_named(clip_folder: Path, tmp_path: Path) -> None:
    head = ClipText(source=str(clip_folder), classes=NAMES)
    with pytest.raises(Mismatch, match="expected features of width 32, found 64"):
        head.build(64)
    with pytest.raises(InvalidInput, match="has no whole CLIP model in safetensors"):
        ClipText(source=str(tmp_path), classes=NAMES).build(32)
    with pytest.raises(InvalidInput, match="classes must be at least 2 names, or from_data"):
        ClipText(classes=("cat",))


def test_a_tuned_model_without_a_processor_is_scored_with_the_bases(
    clip_folder: Path, images: Parquet, tmp_path: Path, store: ArtifactStore
) -> None:
    class Task:
        name = "pets"
        suite = ImageClassification(images, ClipText(source=str(clip_folder), classes=NAMES), feature="pooled")

    base = vision(clip_folder, store)
    load_model(store.open(base, "checkpoint")).save_pretrained(tmp_path)
    bare = ingest(Checkpoint(source=str(tmp_path)), store)
    with pytest.raises(InvalidInput, match="the base has no image processor"):
        evaluate(bare, [Task()], store)
    lent = read_scores(store.open(evaluate(bare, [Task()], store, base=base), "scores"))
    assert lent == read_scores(store.open(evaluate(base, [Task()], store), "scores"))


def test_labels_beyond_the_head_are_refused(clip_folder: Path, images: Parquet, store: ArtifactStore) -> None:
    base = store.open(vision(clip_folder, store), "checkpoint")
    problem: Problem = ImageProblem(ImageClassification(images, Orthonormal(classes=3), feature="pooled"), base)
    with pytest.raises(Mismatch, match="expected 0 to 2, found 3"):
        problem.score(load_model(base), "cpu", quiet)


def test_orthonormal_heads_are_orthonormal_and_distinct() -> None:
    heads = [Orthonormal(classes=10, index=index).build(32).weight for index in range(4)]
    for weight in heads:
        torch.testing.assert_close(weight @ weight.T, torch.eye(10), atol=1e-5, rtol=0)
    for number, weight in enumerate(heads):
        assert torch.equal(weight, Orthonormal(classes=10, index=number).build(32).weight)
        assert all((weight - other).norm() > 1 for other in heads[:number])
    assert not torch.equal(heads[0], Orthonormal(classes=10, seed=8).build(32).weight)
    with pytest.raises(InvalidInput, match="classes must be at most the width of the features, 8"):
        Orthonormal(classes=10).build(8)


def test_class_means_are_what_the_base_itself_sees(digits_base: CheckpointRef, store: ArtifactStore) -> None:
    """Against the nearest class mean computed with numpy; a model that lost what the base knew scores less."""
    suite = ImageClassification(Digits(view="id"), ClassMeans())
    base = store.open(digits_base, "checkpoint")
    problem = suite.open(base)

    def features(split: Split) -> tuple[np.ndarray, np.ndarray]:
        rows = problem.rows(split)
        pixels = torch.stack([row["pixel_values"] for row in rows])
        with torch.no_grad():
            feature = load_model(base)(pixel_values=pixels).last_hidden_state[:, 0]
        return functional.normalize(feature, dim=-1).numpy(), np.array([row["label"] for row in rows])

    train, labels = features("train")
    means = np.stack([train[labels == number].mean(axis=0) for number in range(10)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    test, wanted = features("test")
    expected = float(((test @ means.T).argmax(axis=1) == wanted).mean())
    score, *_ = problem.score(load_model(base), "cpu", quiet)
    assert score.value == pytest.approx(expected, abs=2e-3)  # a tie may fall otherwise
    assert score.value > 0.5
    moved = load_model(base)
    with torch.no_grad():
        moved.get_parameter("layers.0.mlp.fc1.weight").normal_()
    assert problem.score(moved, "cpu", quiet)[0].value < score.value


def test_class_means_need_examples_of_every_class(digits_base: CheckpointRef, store: ArtifactStore) -> None:
    problem = ImageClassification(Digits(view="id"), ClassMeans(classes=11)).open(store.open(digits_base))
    with pytest.raises(InvalidInput, match="the train split has none of class 10"):
        problem.wrap(load_model(store.open(digits_base)))
