"""Notices: what others are told. Events that automations wait for, and artifacts that people find in Prefect.

An event whose receipt matters is posted, and the answer awaited: Prefect's own `emit_event` forgets an event when the
server is away. Its id follows from what it says, so that a server drops it when it is sent again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import NAMESPACE_URL, uuid5

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.events import emit_event

from flows.tables import recipe_name
from flows.workplace import here
from storage.errors import Unavailable
from storage.events import Submission
from storage.queue import Queue
from storage.refs import short

if TYPE_CHECKING:
    from flows.examining import Examined
    from storage.lines import Entry
    from storage.registry import ModelVersion

CREATED = "deltaworks.checkpoint.created"
QUARANTINED = "deltaworks.checkpoint.quarantined"
CHAMPION = "deltaworks.champion.moved"
REFUSED = "deltaworks.merge.refused"


@dataclass(frozen=True)
class Folded:
    """What a run came to: the line's new entries, what was put aside, and how many versions were registered."""

    line: str
    merged: tuple[Entry, ...] = ()
    quarantined: tuple[Submission, ...] = ()
    versions: tuple[int, ...] = ()


def created(line: str, one: Submission) -> None:
    """Post the event that a checkpoint waits in the queue of a line. Unavailable if Prefect does not take it."""
    from prefect.client.orchestration import get_client
    from prefect.events import Event
    from prefect.events.schemas.events import Resource

    # the same whenever it is sent again, so that Prefect takes it once; of another store it is another event
    place = f"{here().store.url}:{line}:{one.content}:{one.number}"
    event = Event(
        id=uuid5(NAMESPACE_URL, f"deltaworks:{place}"),
        event=CREATED,
        resource=Resource(_resource(line, one)),
        payload=_payload(line, one),
    )
    try:
        with get_client(sync_client=True) as client:
            answer = client.request("POST", "/events", json=[event.model_dump(mode="json")])
            answer.raise_for_status()
    except Exception as error:  # httpx, and Prefect's own, which have no root in common
        raise Unavailable(
            f"Prefect did not take the event of {one.task!r}: {type(error).__name__}: {error}",
            remedy="Check PREFECT_API_URL and that the server runs; it is sent again at the next look",
        ) from error


def announce_waiting(queue: Queue) -> int:
    """Post the events of all that wait and were not announced. Returns how many; Unavailable at the first refusal."""
    count = 0
    for one in queue.submissions():
        if one.state == "pending" and not one.announced:
            created(queue.line, one)
            queue.announce(one.content)
            count += 1
    return count


def quarantined(line: str, one: Submission) -> None:
    """Say that a submission was put aside: an event, and an artifact with the reason."""
    emit_event(QUARANTINED, _resource(line, one), payload={**_payload(line, one), "kind": one.kind, "reason": one.why})
    create_markdown_artifact(
        f"## {one.task} was not merged into {line}\n\n"
        f"**{one.kind}**: {one.why}\n\n"
        f"* from `{one.reference}`\n* content `{one.content}`\n* submitted {one.arrived}\n\n"
        f"`deltaworks line requeue {line} {one.content[:12]}` tries again, `line discard` gives it up.",
        key=f"{_key(line)}-quarantine",
        description=f"{one.task}: {one.kind}",
    )


def judged(line: str, entry: Entry, version: ModelVersion, found: Examined) -> None:
    """Say what the gate decided on a version: the event that the champion moved, or that a merge was refused."""
    if found.verdict is None:
        return
    resource = {
        "prefect.resource.id": f"deltaworks.line.{line}",
        "prefect.resource.name": line,
        "deltaworks.line": line,
    }
    said = {"task": entry.task, "version": version.version, "state": entry.state, "model": found.model}
    said |= {"merger": dict(entry.merger), "factor": entry.factor, **({"why": entry.why} if entry.why else {})}
    said |= {"reasons": list(found.verdict.reasons), **found.verdict.facts}
    emit_event(CHAMPION if found.verdict.passed else REFUSED, resource, payload=said)


def worked_off(found: Folded, all_of_them: Sequence[Submission]) -> None:
    """A table of what a run did, in the order of the queue, and links to the new versions."""
    if not (found.merged or found.quarantined):
        return
    submissions = {one.entry: one for one in all_of_them if one.state == "merged"}
    rows = []
    for entry in found.merged:
        one = submissions.get(entry.number)
        became = f"entry {entry.number}{f', {one.kind}' if one and one.kind else ''}"
        if entry.action == "rebuild":
            became = f"{became}, all merged again by {recipe_name(entry.merger)}"
        rows.append(
            {"task": entry.task, "became": became, "update": short(entry.update or ""),
             "state": short(entry.state or ""), "from": one.reference if one else ""}
        )  # fmt: skip
    rows += [
        {"task": one.task, "became": f"quarantined: {one.kind}", "update": "", "state": "", "from": one.reference}
        for one in found.quarantined
    ]
    versions = ", ".join(_linked(found.line, one) for one in found.versions) or "none"
    create_table_artifact(rows, key=f"{_key(found.line)}-pending", description=f"{found.line}: new versions {versions}")


def _linked(model: str, version: int) -> str:
    """A version as a link to its page, if MLflow is a server."""
    address = here().settings.tracking
    if not address.startswith("http"):
        return str(version)
    plain = re.sub(r"//[^/@\s]*@", "//", address).rstrip("/")
    return f"[{version}]({plain}/#/models/{model}/versions/{version}?workflowType=machine_learning)"


def _resource(line: str, one: Submission) -> dict[str, str]:
    return {
        "prefect.resource.id": f"deltaworks.line.{line}.checkpoint.{one.content[:16]}",
        "prefect.resource.name": one.task,
        "deltaworks.line": line,
    }


def _payload(line: str, one: Submission) -> Mapping[str, object]:
    return {
        "line": line,
        "reference": one.reference,
        "base": one.base,
        "content": one.content,
        "task": one.task,
        "weight": one.weight,
    }


def _key(line: str) -> str:
    """Keys of artifacts have no underscores."""
    return line.replace("_", "-")
