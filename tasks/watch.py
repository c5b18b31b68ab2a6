"""Watch: complete new checkpoints of an inbox go into a line's queue, each content once.

    watch/<line>/<first digits of sha256 of the inbox's address>    the cursor: what was seen in which folder, JSON

What a look finds is queued when its folder looks as it did at the look before and nothing is lacking, or when a marker
says so. The cursor only saves reading the same bytes again: without it, or with an old one, everything is read once
more, and the queue knows each content. So a watcher may be killed at any moment, and several may watch one inbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Missing
from storage.events import Submission
from storage.lines import Line
from storage.manifest import canonical
from storage.objects import ObjectStore
from storage.queue import Queue
from tasks.inbox import MARKER, Offer, fingerprint, lacking, offers, task_name


@dataclass(frozen=True)
class Looked:
    """What one look came to. queued: new submissions. known: folders whose content came before, with what it became.
    waiting: folder -> what it lacks, or that it still changes. refused: folder -> why it can never be queued."""

    queued: tuple[Submission, ...] = ()
    known: Mapping[str, Submission] = field(default_factory=dict)
    waiting: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_settled(self) -> bool:
        """Whether a second look would find nothing more, unless something is written."""
        return CHANGING not in self.waiting.values()


CHANGING = "a second look"


class Watch:
    """One inbox that is watched for one line."""

    def __init__(self, inbox: ObjectStore, line: str, store: ArtifactStore) -> None:
        self._inbox = inbox
        self._store = store
        self.queue = Queue(store.objects, line)
        self._line = Line(store.objects, line)
        self.key = f"watch/{line}/{sha256(inbox.url.encode()).hexdigest()[:16]}"

    def look(self) -> Looked:
        """Queue what is complete and new, oldest first."""
        cursor = self._read()
        now: dict[str, dict[str, str]] = {}
        queued: list[Submission] = []
        known: dict[str, Submission] = {}
        waiting: dict[str, str] = {}
        refused: dict[str, str] = {}
        base = self._line.head().base
        for offer in sorted(offers(self._inbox), key=lambda one: (one.completed, one.folder)):
            held, signature = cursor.get(offer.folder, {}), offer.signature
            now[offer.folder] = {"seen": signature}
            if held.get("done") == signature:
                now[offer.folder] = held
                continue
            try:
                lacks = lacking(self._inbox, offer)
                if lacks or not (MARKER in offer.files or held.get("seen") == signature):
                    waiting[offer.folder] = lacks or CHANGING
                    continue
                content = fingerprint(self._inbox, offer)
                if not self._is_still(offer):
                    waiting[offer.folder] = CHANGING
                    continue
                address, name = self._address(offer), task_name(offer.name or self._inbox.url.rsplit("/", 1)[-1])
                one, is_new = self.queue.submit(content, address, base, name)
            except InvalidInput as error:
                refused[offer.folder] = str(error)
                continue
            except Missing:  # it went away while it was read
                waiting[offer.folder] = CHANGING
                continue
            if is_new:
                queued.append(one)
            else:
                known[offer.folder] = one
            now[offer.folder] = {"seen": signature, "done": signature}
        if now != cursor:
            self._store.objects.put(self.key, canonical({"inbox": self._inbox.url, "folders": now}))
        return Looked(tuple(queued), known, waiting, refused)

    def _is_still(self, offer: Offer) -> bool:
        """Whether the folder is as it was before its files were read."""
        again = next((one for one in offers(self._inbox) if one.folder == offer.folder), None)
        return again is not None and again.signature == offer.signature

    def _address(self, offer: Offer) -> str:
        return f"{self._inbox.url.rstrip('/')}/{offer.folder}".rstrip("/")

    def _read(self) -> dict[str, dict[str, str]]:
        """The cursor; empty if there is none that can be read."""
        try:
            found = json.loads(self._store.objects.get(self.key))["folders"]
            return {str(folder): {str(k): str(v) for k, v in one.items()} for folder, one in found.items()}
        except (Missing, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}
