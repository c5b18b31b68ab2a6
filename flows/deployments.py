"""Deployments: which flows Prefect can start, with which parameters, when, and how many at once.

One table is the truth: `deltaworks deploy` registers it, infra/prefect.yaml says the same for `prefect deploy`, and a
test holds them against each other. The deployments of a line are called after it: `merge-pending/support`. Those that
merge into it share a work queue that lets one run go at a time, so that the others do not do the same work twice; what
keeps merges apart is the journal, not this queue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows import service
from flows.notices import CREATED
from flows.schedules import When

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

GENERAL = "store"  # the name of deployments that belong to no line
_LOOKS = timedelta(hours=1)  # from one scheduled watch to the next; each ends shortly before
_ALONE: Mapping[str, Any] = {"limit": 1, "collision_strategy": "ENQUEUE"}
_ENDS = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
# states in which a run has no process, and is not lost
_RESTS = {
    f"prefect.flow-run.{state}"
    for state in ("Scheduled", "Late", "AwaitingConcurrencySlot", "AwaitingRetry", "Cancelling", "Paused", "Suspended")
}
_RUNNING = "prefect.flow-run.Running"
_TAG = "deltaworks"  # of every deployment of ours
_BEATS = {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}}  # seconds; the shortest that Prefect knows
# what an event says, as parameters of the run that it starts; numbers go as JSON, or they would arrive as texts
_FROM_EVENT = {
    **{name: f"{{{{ event.payload.{name} }}}}" for name in ("reference", "line", "base", "content", "task")},
    "weight": {
        "__prefect_kind": "json",
        "value": {"__prefect_kind": "jinja", "template": "{{ event.payload.weight | tojson }}"},
    },
}


@dataclass(frozen=True)
class Planned:
    """One deployment. Several runs of one wait for each other, so that a line has one merge at a time."""

    flow: Any
    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    interval: float | None = None
    cron: str | None = None
    zone: str = "UTC"
    tags: Sequence[str] = ()
    starts_on: str = ""  # the line whose events start it
    queue: str = "default"  # the work queue

    @property
    def full_name(self) -> str:
        return f"{self.flow.name}/{self.name}"

    @property
    def entrypoint(self) -> str:
        return f"{self.flow.fn.__module__}.{self.flow.fn.__name__}"


def planned(lines: Sequence[str], inboxes: Mapping[str, str], when: When) -> list[Planned]:
    """The deployments of these lines, and those of the whole store. `inboxes`: line -> what is watched for it."""
    found = []
    for line in lines:
        own, tags, queue = {"line": line}, (_TAG, f"line:{line}"), queue_of(line)
        found += [
            Planned(service.ingest_checkpoint, line, own, tags=tags, starts_on=line, queue=queue),
            Planned(service.merge_pending, line, own, when.merge_every, zone=when.zone, tags=tags, queue=queue),
            Planned(service.rebuild_line, line, own, tags=tags, queue=queue),
            Planned(service.evaluate_line, line, own, tags=tags),
        ]
        if line in inboxes:
            minutes = _LOOKS.total_seconds() / 60 - 1
            watched = {"source": inboxes[line], "line": line, "every": 5.0, "minutes": minutes}
            found.append(Planned(service.watch, line, watched, _LOOKS.total_seconds(), zone=when.zone, tags=tags))
    found.append(Planned(service.fine_tune_and_merge, GENERAL, tags=(_TAG,)))
    tidy = Planned(service.verify_and_prune, GENERAL, cron=when.tidy_at, zone=when.zone, tags=(_TAG,))
    return [*found, tidy]


def queue_of(line: str) -> str:
    """The work queue of the runs that merge into a line."""
    return f"line-{line}"


def register(plans: Sequence[Planned], pool: str) -> list[UUID]:
    """Create or change these deployments in Prefect. The work pool must be there."""
    return [_deployment(one, pool).apply() for one in plans]


def _deployment(plan: Planned, pool: str) -> Any:
    from prefect.client.schemas.objects import ConcurrencyLimitConfig
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
    from prefect.flows import EntrypointType  # type: ignore[attr-defined]  # documented, but not listed in __all__

    schedules: list[Any] = []
    if plan.interval is not None:
        schedules.append(IntervalSchedule(interval=timedelta(seconds=plan.interval), timezone=plan.zone))
    if plan.cron is not None:
        schedules.append(CronSchedule(cron=plan.cron, timezone=plan.zone))
    return plan.flow.to_deployment(
        plan.name,
        schedules=schedules,
        parameters=dict(plan.parameters),
        concurrency_limit=ConcurrencyLimitConfig(**_ALONE),
        triggers=[_trigger(plan.starts_on)] if plan.starts_on else [],
        tags=list(plan.tags),
        version=version("deltaworks"),
        work_pool_name=pool,
        work_queue_name=plan.queue,
        job_variables=_BEATS,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def _trigger(line: str) -> Any:
    from prefect.events import DeploymentEventTrigger

    return DeploymentEventTrigger(
        name=f"deltaworks: a checkpoint for {line}",
        expect={CREATED},
        match={"deltaworks.line": line},
        for_each={"prefect.resource.id"},
        parameters=_FROM_EVENT,
    )


def end_zombies(client: SyncPrefectClient, start_within: float, silent_for: float = 90.0) -> None:
    """Automations that end runs whose process is gone: they would stay `Pending` or `Running`, and hold their line.

    Every deployed run sends a heartbeat every 30 s. One that was killed before its first heartbeat was on its way is
    told by the server's own event that it was `Running`. A run that does not begin within `start_within` seconds of
    being handed to a worker is given up too. Only runs of these deployments: others may beat more slowly.
    """
    beat = "prefect.flow-run.heartbeat"
    gone = _zombies("without a heartbeat", {beat, _RUNNING}, {beat, *_RESTS, *_ENDS}, silent_for)
    never = _zombies("that never began", {"prefect.flow-run.Pending"}, {_RUNNING, *_RESTS, *_ENDS}, start_within)
    for wanted in (gone, never):
        known = client.read_automations_by_name(wanted.name)
        if not known:
            client.create_automation(wanted)
        elif any(
            _asked(known[0], name) != _asked(wanted, name) for name in ("within", "after", "expect", "match_related")
        ):
            client.update_automation(known[0].id, wanted)  # only then: it forgets the heartbeats that it has seen


def _asked(automation: Any, name: str) -> Any:
    value = getattr(automation.trigger, name)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def give_up_lost(client: SyncPrefectClient, pool: str) -> int:
    """End the runs that a pool left behind when the machine went down: for a server whose only workers went with it.
    Returns how many there were."""
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.states import Crashed

    states = {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}
    lost = client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate({"state": states}),
        work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [pool]}}),
    )
    for run in lost:
        client.set_flow_run_state(run.id, Crashed(message="The machine that it ran on went down"))
    return len(lost)


def _zombies(which: str, after: set[str], expect: set[str], patience: float) -> Any:
    """What ends a run if none of the events `expect` has come so many seconds `after`."""
    from prefect.events import EventTrigger
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, Posture

    return AutomationCore(
        name=f"deltaworks: end runs {which}",
        trigger=EventTrigger(
            after=after,
            expect=expect,
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{_TAG}"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=patience),
        ),
        actions=[ChangeFlowRunState(state="CRASHED", message="Its process is gone")],
    )
