"""Watch versions: new versions of a registered model go into a line's queue, each content once.

    watch/<line>/<first digits of sha256 of models:/NAME>    the cursor: the versions that were looked at, JSON

A version is copied to this machine and taken into the store at once, because a registry may give files only by way of
its own server. The cursor saves copying it again; without it, the queue knows each content.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import InvalidInput, Missing
from storage.events import Submission
from storage.lines import Line
from storage.manifest import canonical
from storage.queue import Queue
from storage.refs import CheckpointRef
from storage.registry_versions import Offered, Versions
from tasks.inbox import Offer, fingerprint, offers, task_name
from tasks.receive import receive
from tasks.watch import Looked


class WatchVersions:
    """One registered model that is watched for one line."""

    def __init__(self, versions: Versions, line: str, store: ArtifactStore) -> None:
        self._versions, self._store = versions, store
        self.queue = Queue(store.objects, line)
        self._line = Line(store.objects, line)
        self.key = f"watch/{line}/{sha256(versions.url.encode()).hexdigest()[:16]}"

    def look(self) -> Looked:
        """Queue what is new, oldest first. What cannot be used is queued and put aside, with the reason."""
        done = self._read()
        queued: list[Submission] = []
        known: dict[str, Submission] = {}
        refused: dict[str, str] = {}
        for one in self._versions.ready():
            if one.version in done:
                continue
            try:
                submission, is_new = self._submit(one)
                if is_new:
                    queued.append(submission)
                else:
                    known[one.address] = submission
            except InvalidInput as error:
                refused[one.address] = str(error)
            done = sorted({*done, one.version})
            self._store.objects.put(self.key, canonical({"source": self._versions.url, "versions": done}))
        return Looked(tuple(queued), known, {}, refused)

    def _submit(self, one: Offered) -> tuple[Submission, bool]:
        """Into the queue, by way of the store. InvalidInput if it holds no weights to tell it by."""
        base = self._line.head().base
        with self._versions.files(one) as folder:
            place = _checkpoint_in(folder, one)
            objects = DirectoryObjects(place)
            content = fingerprint(objects, Offer("", {item.key: item for item in objects.listed("")}))
            if (held := self.queue.find(content)) is not None:
                return held, False
            name = task_name(f"{one.name}-{one.version}")
            try:
                reference = receive(content, str(place), base, self._store)
            except InvalidInput as error:
                return self._put_aside(content, one, base, name, str(error).replace(str(place), one.address))
            return self.queue.submit(content, reference, base, name)

    def _put_aside(
        self, content: str, one: Offered, base: CheckpointRef, name: str, why: str
    ) -> tuple[Submission, bool]:
        found, is_new = self.queue.submit(content, one.address, base, name)
        self.queue.quarantine(content, "InvalidInput", why)
        return self.queue.find(content) or found, is_new

    def _read(self) -> list[int]:
        """The versions that were looked at; none if there is no cursor that can be read."""
        try:
            return [int(one) for one in json.loads(self._store.objects.get(self.key))["versions"]]
        except (Missing, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []


def _checkpoint_in(folder: Path, one: Offered) -> Path:
    """The one folder among a version's files that holds weights: MLflow's flavors put them into one of their own."""
    found = offers(DirectoryObjects(folder))
    if len(found) != 1:
        listed = ", ".join(offer.folder or "." for offer in found) or "none"
        raise InvalidInput(
            f"{one.address} must hold one folder with weights, found {listed}",
            remedy="Register the folder that save_pretrained wrote",
        )
    return folder / found[0].folder
