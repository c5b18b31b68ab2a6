"""`deltaworks deploy`: the deployments of lines and of the store, registered in Prefect."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from flows.pools import IMAGE, KINDS, Pool, ensure_pool, ensure_queues, set_gpu_slots
from flows.schedules import schedules
from flows.terminal import called, console, errors_explained, open_workplace
from flows.words import interval
from storage.errors import InvalidInput, Missing, Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from flows.deployments import Planned
    from flows.schedules import When
    from flows.workplace import Workplace

POOL = "deltaworks"

Lines = Annotated[
    list[str] | None,
    typer.Option("--line", metavar="NAME", help="A line. May be repeated. [default: all of the store]"),
]
Inboxes = Annotated[
    list[str] | None,
    typer.Option("--inbox", metavar="LINE=ADDRESS", help="Watch this inbox for the line. May be repeated."),
]
PoolName = Annotated[str, typer.Option("--pool", help="The work pool that the runs go to.")]
PoolType = Annotated[
    str, typer.Option("--pool-type", metavar="process|docker|kubernetes", help="Of which type it is created.")
]
GpuSlots = Annotated[
    int | None,
    typer.Option("--gpu-slots", min=0, help="How many stages may use a GPU at once, over all workers; 0: any number."),
]


def deploy(
    line: Lines = None,
    inbox: Inboxes = None,
    pool: PoolName = POOL,
    pool_type: PoolType = "process",
    image: Annotated[str, typer.Option(help="The image of a pool of containers, with Deltaworks in it.")] = IMAGE,
    gpu_slots: GpuSlots = None,
    merge_every: Annotated[
        str, typer.Option(metavar="TIME|never", help="Merge what waits, also if an event was lost: 10m, 1h.")
    ] = "10m",
    tidy_at: Annotated[
        str, typer.Option(metavar="CRON|never", help="Verify the store, and count what could go.")
    ] = "0 3 * * 0",
    zone: Annotated[str, typer.Option(metavar="ZONE", help="Time zone of the schedules, like Europe/Berlin.")] = "UTC",
    start_within: Annotated[
        str, typer.Option(metavar="TIME", help="Give up a run that a worker took, if it has not begun by then.")
    ] = "2m",
) -> None:
    """Register the flows in Prefect: parameters, schedules, what an event starts, and one merge at a time for a line.

    The same again changes what is different. The work pool is created if it is not there, and used as it is otherwise.

    Examples:  deltaworks deploy --line support --inbox support=s3://models/inbox --zone Europe/Berlin

               deltaworks deploy --pool cluster --pool-type kubernetes --image registry/deltaworks:cuda --gpu-slots 2
    """
    with errors_explained():
        where = wanted_pool(pool, pool_type, image)
        when, patience = schedules(merge_every, tidy_at, zone), interval(start_within)
        if not os.environ.get("PREFECT_API_URL"):
            raise InvalidInput(
                "PREFECT_API_URL is not set, and deployments belong to a Prefect server",
                remedy=f"Set it, or let `{called()} up` start a server, a worker and all else on this machine",
            )
        place = open_workplace()
        lines, inboxes = chosen(place, line or [], inbox or [])
        plans = registered(lines, inboxes, when, where, patience, gpu_slots)
        table(plans)
        needs = "sees the store" if pool_type == "process" else f"has prefect-{pool_type} and may start containers"
        console.print(f"next: prefect worker start --pool {pool} --type {pool_type}    on a machine that {needs}")


def chosen(place: Workplace, lines: Sequence[str], inboxes: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The lines and what is watched for them. All must be there."""
    from storage.lines import Line

    known = Line.names(place.store.objects)
    watched = dict(_inbox(one) for one in inboxes)
    wanted = list(dict.fromkeys([*lines, *watched])) if lines else known
    absent = [one for one in [*wanted, *watched] if one not in known]
    if absent:
        begin = f"`{called()} line open {absent[0]} BASE --merger NAME` begins it"
        raise Missing(
            f"there is no line {absent[0]!r} in {place.store.url}",
            remedy=f"There are: {', '.join(known) or 'none yet'}; {begin}",
        )
    return wanted, watched


def wanted_pool(name: str, kind: str, image: str = IMAGE) -> Pool:
    if kind not in KINDS:
        raise InvalidInput(f"--pool-type must be {', '.join(KINDS)}, found {kind!r}")
    return Pool(name, kind, image)  # type: ignore[arg-type]


def registered(
    lines: Sequence[str],
    inboxes: Mapping[str, str],
    when: When,
    pool: Pool,
    start_within: float = 120.0,
    gpu_slots: int | None = None,
    silent_for: float = 90.0,
) -> list[Planned]:
    """Register them, with the pool, the queues and the automations that end runs whose process is gone.

    silent_for: seconds without a heartbeat, of which there is one every 30, after which a run is given up.
    """
    from prefect.client.orchestration import get_client

    from flows.deployments import end_zombies, planned, queue_of, register

    plans = planned(lines, inboxes, when)
    try:
        with get_client(sync_client=True) as client:
            ensure_pool(client, pool)
            ensure_queues(client, pool.name, [queue_of(line) for line in lines])
            end_zombies(client, start_within, silent_for)
            if gpu_slots is not None:
                set_gpu_slots(client, gpu_slots)
        register(plans, pool.name)
    except OSError as error:
        raise Unavailable(f"Prefect at {os.environ['PREFECT_API_URL']} does not answer: {error}") from error
    return plans


def table(plans: Sequence[Planned]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    found = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("deployment", "starts"):
        found.add_column(column, no_wrap=True)
    for one in plans:
        ways = [f"every {one.interval:g} s"] if one.interval else []
        ways += [f"at {one.cron} ({one.zone})"] if one.cron else []
        ways += ["on deltaworks.checkpoint.created"] if one.starts_on else []
        found.add_row(one.full_name, ", ".join(ways) or "when asked")
    console.print(found)


def _inbox(text: str) -> tuple[str, str]:
    line, equals, address = text.partition("=")
    if not equals or not line or not address:
        raise InvalidInput(f"--inbox {text}: is not of the form LINE=ADDRESS", remedy="Write support=s3://models/inbox")
    return line, address if ":/" in address else os.path.abspath(address)
