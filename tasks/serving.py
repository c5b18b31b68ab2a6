"""Serving: a model of the store as `mlflow.pyfunc` loads it, its weights read from the store tensor by tensor.

MLflow imports this module by its name, which the MLmodel file of each version holds (storage/registry_pyfunc.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy
import torch
from torch import Tensor, nn

from storage.address import open_objects
from storage.artifacts import Artifact, ArtifactStore
from storage.errors import DeltaworksError, InvalidInput, Mismatch, Missing, Unavailable, rebuilt
from storage.manifest import Lineage
from storage.refs import Ref, parse_ref, short
from storage.registry_pyfunc import Rows, answering
from tasks.checkpoints import load_model, skeleton_of
from tasks.choice import restored
from tasks.suites import AnySuite
from tasks.suites.base import Answering, Batch
from tasks.suites.images import ImageReader, pixels_of
from tasks.suites.texts import TextReader, pooled, require_fitting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOADER = __name__
SETTINGS: Mapping[str, Any] = {
    "device": "cpu",
    "batch": 16,
    "max_tokens": 256,
    "max_new_tokens": 64,
    "task": "",
    "store": "",
}
PARAMETERS: Mapping[str, str] = {"task": ""}  # of a request
_IMAGES, _TEXTS = "pixel_values", "input_ids"
_LARGEST = 1024  # numbers of an example: it is kept with every version
_GREY = (  # an image of 8 x 8 as a PNG in base64
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAEElEQVR42mNsYIAAJgaKGAAmCACQtTEKkQAAAABJRU5ErkJggg=="
)
T = TypeVar("T")


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Served:
    """What `mlflow.pyfunc.load_model` calls. `path`: a file that names a checkpoint and its store, as JSON.

    `model_config`: other SETTINGS; rows at once, tokens that are read of a text, tokens that are generated, the task
    whose head answers where a request names none, and another store that holds the same refs. Credentials come from the
    environment alone. Errors name the version's weights and say how to lead this process to them.
    """
    named, settings = json.loads(Path(path).read_text()), {**SETTINGS, **(model_config or {})}
    ref, address = parse_ref(str(named["ref"]), "checkpoint"), str(settings["store"] or named["store"])
    try:
        store = ArtifactStore(open_objects(address))
        checkpoint = store.open(ref, "checkpoint")
    except (Missing, Unavailable, InvalidInput) as error:
        what, remedy = f"the weights of this version, {short(ref)} in {address}", _way_to(address)
        raise rebuilt(type(error), f"{what}, cannot be read: {error}. {remedy}", remedy) from error
    scores = parse_ref(str(named["scores"]), "scores") if "scores" in named else None
    return Served(checkpoint, settings, Heads(scores, store) if scores else None)


def _way_to(address: str) -> str:
    here = "It is a folder of the machine that registered it, so load it there"
    if address.startswith("s3://"):
        here = (
            "No version holds a server's address or keys: set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY as they were where it was registered"
        )
    return f"{here}, or name a store that has a copy: load_model(..., model_config={{'store': ADDRESS}})"


class Served:
    """A checkpoint that answers. What it answers with is told by its architecture:

    - `...ForSequenceClassification`, a list or a column of texts: {"label", "score", "scores": {label: probability}}
    - `...ForImageClassification`, images: the same
    - a language model that generates, texts: what it writes after each, greedily
    - any other that reads texts or images: its features [B, D], the mean of the last hidden state over all tokens that
      are no padding, or over all patches

    Images are pixel values [B, C, H, W] as the model takes them, or, of a checkpoint with an image processor, PIL
    images, the bytes of files, or these in base64.

    Heads that a suite makes are no part of a checkpoint. A request that names a task that the version was measured on,
    `{"task": "rot90"}`, is answered by its head, as the suite does it: {"label", "score", "scores"}. A suite of texts
    in pairs takes pairs.
    """

    def __init__(self, checkpoint: Artifact, settings: Mapping[str, Any], heads: Heads | None = None) -> None:
        self._settings, self._name, self._heads = settings, short(checkpoint.ref), heads
        architecture = skeleton_of(checkpoint).architecture
        self._model: PreTrainedModel = load_model(checkpoint, str(settings["device"]))
        self._reads = str(self._model.main_input_name)
        if self._reads not in (_IMAGES, _TEXTS):
            raise InvalidInput(
                f"{self._name} is a {architecture}, which reads {self._reads}: only texts and images are served",
                remedy="`deltaworks export` writes it as a folder for transformers",
            )
        self._classifies = architecture.endswith(("ForSequenceClassification", "ForImageClassification"))
        self._generates = self._reads == _TEXTS and bool(self._model.can_generate())
        if self._reads == _IMAGES:
            self._images, self._size = ImageReader(checkpoint), pixels_of(checkpoint)
        else:
            self._reader = TextReader(checkpoint, int(settings["max_tokens"]), "cut")
            self._reader.tokenizer.padding_side = "left" if self._generates else "right"
            require_fitting(self._reader.tokenizer, self._model)

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """The answers to the rows of a list, an array or a DataFrame with one column, in their order.

        `params`: `task`, whose head is to answer. Raises InvalidInput for rows that are no texts, or no images that the
        model takes, and for a task that is not known.
        """
        task = str((params or {}).get("task") or self._settings["task"])
        with answering(), torch.inference_mode():
            return self._by_head(task, model_input) if task else self._by_itself(model_input)

    def _by_itself(self, model_input: Any) -> Any:
        parts = [self._fitting(batch, self._answer) for batch in self._batches(model_input)]
        if self._classifies or self._generates:
            return [row for part in parts for row in part]
        return numpy.concatenate(parts) if parts else numpy.zeros((0, 0), dtype=numpy.float32)

    def _by_head(self, task: str, given: Any) -> list[dict[str, Any]]:
        if self._heads is None:
            raise InvalidInput(
                f"{self._name} was given the task {task!r}, but this version was not measured on any",
                remedy="Leave the task out: it answers with features, or by its own head",
            )
        head = self._heads.of(task, self._model)
        rows, size, found = _column(given), int(self._settings["batch"]), []
        for start in range(0, len(rows), size):
            batch = {
                name: value.to(self._model.device) for name, value in head.read(rows[start : start + size]).items()
            }
            found += self._fitting(batch, lambda one: _labelled(head.module(**one)["logits"], head.labels))
        return found

    def _batches(self, given: Any) -> Iterator[dict[str, Tensor]]:
        rows = _column(given) if self._reads == _IMAGES else self._texts(given)
        size, device = int(self._settings["batch"]), self._model.device
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            if self._reads == _IMAGES:
                yield {_IMAGES: self._images.read(some).to(device, self._model.dtype)}
            else:
                found = self._reader.read([(text,) for text in some])
                yield {name: value.to(device) for name, value in found.items()}

    def _texts(self, given: Any) -> Sequence[str]:
        rows: Sequence[str] = _column(given)
        wrong = next((number for number, row in enumerate(rows) if not isinstance(row, str)), None)
        if wrong is not None:
            raise InvalidInput(
                f"row {wrong} given to {self._name}: expected a text, found {type(rows[wrong]).__name__}"
            )
        return rows

    def _fitting(self, batch: dict[str, Tensor], answer: Callable[[dict[str, Tensor]], T]) -> T:
        """An answer to a batch. Mismatch where the model refuses images of another size than its config names."""
        try:
            return answer(batch)
        except (RuntimeError, ValueError) as error:
            found = tuple(batch[_IMAGES].shape[1:]) if _IMAGES in batch else ()
            if not found or all(size in (-1, one) for size, one in zip(self._size, found, strict=True)):
                raise
            raise Mismatch(f"images given to {self._name}", expected=list(self._size), found=list(found)) from error

    def _answer(self, batch: dict[str, Tensor]) -> Any:
        if self._generates:
            return self._written(batch)
        if self._classifies:
            names: Mapping[int, str] = self._model.config.id2label or {}
            logits_BC = self._model(**batch).logits
            return _labelled(logits_BC, [str(names.get(number, number)) for number in range(logits_BC.shape[1])])
        if self._reads == _TEXTS:
            features = pooled(self._model, "mean", batch)
        else:
            hidden: Tensor = self._model.base_model(**batch).last_hidden_state
            features = hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))
        return features.float().cpu().numpy()

    def _written(self, batch: dict[str, Tensor]) -> list[str]:
        model: Any = self._model  # transformers leaves generate without types
        tokenizer = self._reader.tokenizer
        batch.pop("token_type_ids", None)
        most = int(self._settings["max_new_tokens"])
        tokens = model.generate(**batch, max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        new = tokens[:, batch[_TEXTS].shape[1] :]
        found: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
        return found


class Heads:
    """The heads of the tasks that a version was measured on, by the suites that made them; each is made once.

    What a head is made of must be there: class names of the data, the base, or the files of a text tower.
    """

    def __init__(self, scores: Ref, store: ArtifactStore) -> None:
        self._scores, self._store = scores, store
        self._made: dict[str, Headed] = {}

    @cached_property
    def _lineage(self) -> Lineage:
        """Read when a task is first named: a copy of the weights alone answers for itself."""
        return self._store.open(self._scores, "scores").manifest.lineage

    def of(self, task: str, backbone: PreTrainedModel) -> Headed:
        inputs, suites = self._lineage.inputs, self._lineage.spec["tasks"]
        if task not in suites:
            raise InvalidInput(f"no task {task!r}", remedy=f"This version was measured on {', '.join(suites)}")
        if task not in self._made:
            base = self._store.open(inputs.get("base", inputs["model"]), "checkpoint")
            problem = restored(AnySuite, suites[task]["suite"]).open(base)
            if not isinstance(problem, Answering):
                raise InvalidInput(
                    f"the suite of task {task!r} has no head that gives labels",
                    remedy="Leave the task out: the model answers for itself",
                )
            module = problem.wrap(backbone).to(backbone.device).eval()
            self._made[task] = Headed(module, problem.read, problem.label_names)
        return self._made[task]


class Headed(NamedTuple):
    """A model with the head of a task. `read`: rows -> a batch; `labels`: of the logits, in order."""

    module: nn.Module
    read: Callable[[Sequence[Any]], Batch]
    labels: Sequence[str]


def _labelled(logits_BC: Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for row in logits_BC.float().softmax(dim=1).tolist():
        best = max(range(len(row)), key=row.__getitem__)
        found.append({"label": labels[best], "score": row[best], "scores": dict(zip(labels, row, strict=True))})
    return found


def _column(given: Any) -> Any:
    """The rows as a list or an array: MLflow's server gives DataFrames, and arrays of Python objects."""
    if hasattr(given, "columns"):
        if len(given.columns) != 1:
            raise InvalidInput(f"a table of {len(given.columns)} columns was given", remedy="Give one column")
        return given.iloc[:, 0].tolist()
    if isinstance(given, str):
        return [given]
    if isinstance(given, numpy.ndarray) and given.dtype.kind in "OU":  # what the server makes of texts, or of pairs
        return given.reshape(-1).tolist() if given.ndim < 2 or given.shape[1] == 1 else given.tolist()
    return given if isinstance(given, numpy.ndarray) else list(given)


def rows_of(checkpoint: Artifact) -> Rows | None:
    """What a model takes, for MLflow to tell with its versions; None for one that is not served."""
    try:
        reads = str(skeleton_of(checkpoint).model_class.main_input_name)
    except DeltaworksError:  # no config, or none that transformers knows: it is registered all the same
        return None
    if reads == _TEXTS:
        return Rows(("A text.", "Another one."))
    if reads != _IMAGES:
        return None
    if ImageReader(checkpoint).has_processor:
        return Rows((_GREY,))
    shape = pixels_of(checkpoint)
    small = min(shape) > 0 and numpy.prod(shape) <= _LARGEST
    return Rows(numpy.full((1, *shape), 0.5).tolist() if small else (), shape)
