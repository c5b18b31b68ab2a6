"""Versions of a line, read back from the registry: what each holds, which aliases point to it, what it scored.

`NAME@VERSION` is how people say one: a number, or an alias such as `champion`; without it the newest, `head`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from storage.errors import InvalidInput, Missing
from storage.refs import CheckpointRef, Ref, StateRef, UpdateRef, parse_ref
from storage.registry import _KEY, _LEFT_OUT, HEAD, Registry
from storage.registry_errors import mapped

# without the last word MLflow shows its pages for agents, in which a model's version is an agent's
_PAGES = "#/models/{name}/versions/{number}?workflowType=machine_learning"
_RUNS = "#/experiments/{experiment}/runs/{run}?workflowType=machine_learning"


@dataclass(frozen=True)
class LineVersion:
    """One version of a line's model. `tags` as tasks/register.py wrote them; `aliases` sorted."""

    name: str
    number: int
    aliases: tuple[str, ...]
    run_id: str
    description: str
    tags: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"

    @property
    def left_out(self) -> bool:
        """Whether it was kept out of the line by its gate."""
        return _LEFT_OUT in self.tags

    @property
    def step(self) -> int:
        """How many updates it holds."""
        return int(self.tags["step"])

    @property
    def base(self) -> CheckpointRef:
        return CheckpointRef(self._ref("base"))

    @property
    def update(self) -> UpdateRef:
        """The update that was merged last."""
        return UpdateRef(self._ref("update"))

    @property
    def state(self) -> StateRef:
        return StateRef(self._ref("state"))

    @property
    def model(self) -> CheckpointRef:
        return CheckpointRef(self._ref("model"))

    def _ref(self, tag: str) -> Ref:
        return parse_ref(self.tags[tag])


class LineVersions:
    """The versions of the registered model of line `name` that Deltaworks made."""

    def __init__(self, registry: Registry, name: str) -> None:
        self._registry, self._client, self.name = registry, registry._client, name

    def all(self) -> list[LineVersion]:
        """Oldest first. Raises Missing if there is no such model."""
        with mapped(self._registry.tracking):
            if not self._client.search_registered_models(f"name = '{self.name}'"):
                raise Missing(
                    f"there is no registered model {self.name!r}",
                    remedy="It is called as its line, and is there once something was merged into it",
                )
            aliases = self._client.get_registered_model(self.name).aliases
            found = [
                _read(one, tuple(sorted(alias for alias, number in aliases.items() if int(number) == int(one.version))))
                for one in self._registry._versions(self.name)
                if _KEY in one.tags
            ]
        return sorted(found, key=lambda one: one.number)

    def one(self, which: str | None = None) -> LineVersion:
        """The version with this number or alias; without one the head. Missing names those that there are."""
        found = self.all()
        wanted = which or HEAD
        for one in found:
            if wanted in (str(one.number), *one.aliases):
                return one
        numbers = f"1 to {found[-1].number}" if found else "none"
        aliases = ", ".join(sorted({alias for one in found for alias in one.aliases})) or "none"
        raise Missing(f"{self.name!r} has no version {wanted!r}", remedy=f"Versions: {numbers}; aliases: {aliases}")

    def numbers(self, version: LineVersion) -> dict[str, float]:
        """Its scores and what they say of the line, under the names that MLflow shows: `average`, `accuracy/TASK`, …"""
        with mapped(self._registry.tracking):
            return {name: float(value) for name, value in self._client.get_run(version.run_id).data.metrics.items()}

    def page(self, version: LineVersion) -> str | None:
        """Where a browser finds it; None where no MLflow server is known, only its database."""
        return self._at(_PAGES.format(name=quote(version.name, safe=""), number=version.number))

    def run_page(self, version: LineVersion) -> str | None:
        """Where a browser finds the run that made it."""
        with mapped(self._registry.tracking):
            experiment = self._client.get_run(version.run_id).info.experiment_id
        return self._at(_RUNS.format(experiment=experiment, run=version.run_id))

    def stage_pages(self, version: LineVersion) -> dict[str, str]:
        """Stage -> where a browser finds its run, `""` being the version itself; empty where no server is known."""
        first = self.page(version)
        if first is None:
            return {}
        with mapped(self._registry.tracking):
            experiment = self._client.get_run(version.run_id).info.experiment_id
            inside = f"tags.`mlflow.parentRunId` = '{version.run_id}'"
            runs = self._client.search_runs([experiment], inside, max_results=100)
        pages = {str(run.data.tags.get("stage", "")): str(run.info.run_id) for run in runs}
        found = {stage: self._at(_RUNS.format(experiment=experiment, run=run)) or "" for stage, run in pages.items()}
        return {**found, "": first}

    def _at(self, page: str) -> str | None:
        address = self._registry.tracking
        return f"{address.rstrip('/')}/{page}" if address.startswith("http") else None


class RunFiles:
    """Small files beside the numbers of a run, such as pictures."""

    def __init__(self, registry: Registry, run_id: str) -> None:
        self._registry, self._run = registry, run_id

    def names(self) -> list[str]:
        with mapped(self._registry.tracking):
            return [str(one.path) for one in self._registry._client.list_artifacts(self._run)]

    def write(self, name: str, text: str) -> None:
        with mapped(self._registry.tracking):
            self._registry._client.log_text(self._run, text, name)


def named_version(text: str) -> tuple[str, str | None]:
    """`NAME@VERSION` or `NAME` as typed, in two."""
    name, _, which = text.strip().partition("@")
    if not name or (not which and "@" in text):
        raise InvalidInput(f"{text!r} names no version", remedy="Write it like support@3, support@champion or support")
    return name, which or None


def _read(found: Any, aliases: tuple[str, ...]) -> LineVersion:
    tags = {str(name): str(value) for name, value in found.tags.items()}
    return LineVersion(
        str(found.name), int(found.version), aliases, str(found.run_id), str(found.description or ""), tags
    )
