"""The registry: runs, scores and model versions in MLflow. The only file that imports mlflow.

MLflow holds numbers, names and addresses; weights stay in the artifact store. Everything is written under a content
key and looked up before it is created, so registering twice, or again after a crash, changes nothing.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# mlflow reads these when it is imported: what it would print belongs to the command, which has its own words
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from storage.champions import Champions
from storage.errors import Missing
from storage.refs import KINDS, Ref, parse_ref
from storage.registry_errors import mapped
from storage.registry_pyfunc import FOLDER

HEAD = "head"  # alias of the newest version of a line
_KEY = "deltaworks.key"
_LEFT_OUT = "deltaworks.left_out"
_REF = re.compile(rf"(?:{'|'.join(KINDS)})/[0-9a-f]{{64}}(?![0-9a-f])")
_PARENT = "mlflow.parentRunId"
_PARAM_LIMIT = 6000
_TAG_LIMIT = 5000
_DIGEST_LIMIT = 36


@dataclass(frozen=True)
class DataInput:
    """The data that a stage used: the fingerprint of its examples, where they come from, numbers of them."""

    name: str
    fingerprint: str
    source: Mapping[str, Any]
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """One stage of a step, which becomes one MLflow run: its settings, its numbers, the ref that it made.

    `series` are metrics over steps, such as a loss curve: name -> (step, value). `data`: what it was trained on.
    """

    name: str
    ref: str
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    data: DataInput | None = None


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model, and whether this call created it."""

    name: str
    version: int
    run_id: str
    fresh: bool


class Registry:
    """MLflow at `tracking`: `sqlite:///...` opened directly, or the http address of a server."""

    def __init__(self, tracking: str, artifacts: Path) -> None:
        self.tracking = tracking
        self._artifacts = artifacts
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        with mapped(tracking), self._first_start():
            self._client = MlflowClient(tracking, registry_uri=tracking)
            self._client.search_experiments(max_results=1)

    def register(
        self,
        experiment: str,
        key: str,
        step: Stage,
        stages: Sequence[Stage],
        source: str,
        description: str,
        *,
        left_out: bool = False,
        folder: Mapping[str, bytes] | None = None,
    ) -> ModelVersion:
        """Record one step of a line: a parent run, a child run per stage, and a version of model `step.name`.

        `source` is the address of the weights in the store, `description` what people read first on the version's
        page. If a version with this `key` exists, nothing is written. `left_out`: it is no part of the line, so that
        it is never its head.
        """
        with mapped(self.tracking):
            found = self._find_version(step.name, key)
            fresh = found is None
            if fresh:
                parent = self._run(experiment, f"{key}/step", step)
                for stage in stages:
                    self._run(experiment, f"{key}/{stage.name}", stage, parent=parent)
                tags = {**step.tags, _KEY: key, "model": step.ref, **({_LEFT_OUT: "true"} if left_out else {})}
                if folder is not None:
                    tags["weights"] = source
                    source = self._log_folder(parent, folder)
                self._ensure_model(step.name)
                found = self._client.create_model_version(
                    step.name,
                    source,
                    run_id=parent,
                    tags=_fit(tags, _TAG_LIMIT),
                    description=_cut(description, _TAG_LIMIT),  # as wide as MLflow's column, which Postgres enforces
                )
            version = ModelVersion(step.name, int(found.version), str(found.run_id), fresh)
            self._move_head(version)
            return version

    @contextmanager
    def champions(self, name: str) -> Iterator[Champions]:
        """The champion of a registered model, to look at or to change in the block."""
        with mapped(self.tracking):
            if not self._client.search_registered_models(f"name = '{name}'"):
                raise Missing(
                    f"there is no registered model {name!r}",
                    remedy="It is called as its line, and is there once a chain has merged into it",
                )
            yield Champions(self._client, name)

    def newest(self, name: str) -> int | None:
        """The newest version of a registered model."""
        with mapped(self.tracking):
            versions = self._versions(name)
            return max((int(one.version) for one in versions), default=None)

    def find(self, name: str, key: str) -> int | None:
        with mapped(self.tracking):
            found = self._find_version(name, key)
            return None if found is None else int(found.version)

    def refs(self) -> frozenset[Ref]:
        """Every ref that a version of a registered model names: its model, and what its tags tell of its making."""
        found: set[Ref] = set()
        with mapped(self.tracking):
            token = None
            while True:
                page = self._client.search_model_versions(max_results=1000, page_token=token)
                for one in page:
                    found.update(_refs_in([one.source or "", *one.tags.values()]))
                token = page.token
                if not token:
                    return frozenset(found)

    def log_chain(self, experiment: str, key: str, summary: Stage, files: Sequence[Path]) -> str:
        """Record a finished chain as one run with its pictures. Returns the run id."""
        with mapped(self.tracking):
            run = self._run(experiment, key, summary)
            for path in files:
                self._client.log_artifact(run, str(path))
            return run

    def _run(self, experiment: str, key: str, stage: Stage, parent: str | None = None) -> str:
        """The run with this key, created or completed. Metrics carry time 0, so writing them again adds no points."""
        where = self._experiment(experiment)
        runs = self._client.search_runs([where], f"tags.`{_KEY}` = '{key}'", max_results=1)
        if runs:
            run = runs[0].info
            if run.status == "FINISHED":
                return str(run.run_id)
        else:
            tags = {_KEY: key, "ref": stage.ref, **stage.tags, **({_PARENT: parent} if parent else {})}
            name = stage.tags.get("run", stage.name)
            run = self._client.create_run(where, run_name=name, tags=_fit(tags, _TAG_LIMIT)).info
        metrics = [Metric(_metric_name(name), value, 0, 0) for name, value in stage.metrics.items()]
        for name, points in stage.series.items():
            metrics += [Metric(_metric_name(name), value, 0, step) for step, value in points]
        params = [Param(name, value) for name, value in _fit(_flatten(stage.params), _PARAM_LIMIT).items()]
        self._client.log_batch(run.run_id, metrics=metrics, params=params, tags=[RunTag("stage", stage.name)])
        if stage.data is not None:
            self._client.log_inputs(run.run_id, [_dataset(stage.data)])
        self._client.set_terminated(run.run_id, "FINISHED")
        return str(run.run_id)

    def _log_folder(self, run: str, files: Mapping[str, bytes]) -> str:
        """Put small files into a folder of the run's artifacts; its address."""
        with TemporaryDirectory(prefix="deltaworks-") as made:
            for name, content in files.items():
                Path(made, name).write_bytes(content)
            self._client.log_artifacts(run, made, FOLDER)
        return f"{self._client.get_run(run).info.artifact_uri}/{FOLDER}"

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        # a server knows where its artifacts belong; a database opened directly would put them in the current folder
        local = None if self.tracking.startswith("http") else (self._artifacts / name).as_uri()
        try:
            return str(self._client.create_experiment(name, artifact_location=local))
        except MlflowException as error:
            if error.error_code == "RESOURCE_ALREADY_EXISTS":  # somebody else created it a moment ago
                return self._experiment(name)
            raise

    def _ensure_model(self, name: str) -> None:
        try:
            self._client.create_registered_model(name, description="One line of Deltaworks: every version is a merge")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _versions(self, name: str) -> list[Any]:
        return list(self._client.search_model_versions(f"name = '{name}'", max_results=10_000))

    def _find_version(self, name: str, key: str) -> Any:
        return next((one for one in self._versions(name) if one.tags.get(_KEY) == key), None)

    def _move_head(self, version: ModelVersion) -> None:
        inside = [int(one.version) for one in self._versions(version.name) if _LEFT_OUT not in one.tags]
        if not inside:
            return
        newest = max(inside)
        current = self._client.get_registered_model(version.name).aliases.get(HEAD)
        if current is None or int(current) != newest:
            self._client.set_registered_model_alias(version.name, HEAD, str(newest))

    @contextmanager
    def _first_start(self) -> Iterator[None]:
        """One process at a time creates the tables of a new SQLite file; two at once would both fail."""
        if not self.tracking.startswith("sqlite:///"):
            yield
            return
        path = Path(self.tracking.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _refs_in(texts: Sequence[str]) -> Iterator[Ref]:
    for text in texts:
        for match in _REF.finditer(text):
            yield parse_ref(match[0])


def _dataset(data: DataInput) -> DatasetInput:
    """A data set as MLflow lists it. Its digests have at most 36 characters: the whole fingerprint is in a tag."""
    source, profile = (json.dumps(one, sort_keys=True) for one in (data.source, data.counts))
    kind = str(data.source.get("name", "data"))
    dataset = Dataset(data.name, data.fingerprint[:_DIGEST_LIMIT], f"deltaworks {kind}", source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training"), InputTag("sha256", data.fingerprint)])


def _metric_name(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names, the way MLflow shows parameters."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _fit(values: Mapping[str, Any], limit: int) -> dict[str, str]:
    return {name: _cut(str(value), limit) for name, value in values.items()}


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
