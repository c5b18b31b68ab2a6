"""`deltaworks up`: everything the service needs, on this machine, in one command that one Ctrl-C ends."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.deploy import POOL, GpuSlots, Inboxes, Lines, PoolName, chosen, registered, table, wanted_pool
from flows.schedules import schedules
from flows.terminal import console, errors_explained, open_workplace

if TYPE_CHECKING:
    from configs.settings import Settings
    from flows.servers import Server

_QUICK = 30.0  # seconds: a process that ends sooner than that, so often in a row, is not started again
_TIMES = 5


def up(
    line: Lines = None,
    inbox: Inboxes = None,
    pool: PoolName = POOL,
    merge_every: Annotated[str, typer.Option(metavar="TIME|never", help="Merge what waits at least so often.")] = "10m",
    tidy_at: Annotated[str, typer.Option(metavar="CRON|never", help="Verify the store then.")] = "0 3 * * 0",
    zone: Annotated[str, typer.Option(metavar="ZONE", help="Time zone of the schedules, like Europe/Berlin.")] = "UTC",
    host: Annotated[
        str, typer.Option(help="Address of the servers. They have no password: keep loopback.")
    ] = "127.0.0.1",
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow; the next free one if taken.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect; the next free one if taken.")] = 4200,
    limit: Annotated[int, typer.Option(min=1, help="How many runs at once.")] = 2,
    gpu_slots: GpuSlots = None,
    webhook_secret: Annotated[
        str | None, typer.Option(metavar="FILE", help="Listen for signed notices of new checkpoints, checked with it.")
    ] = None,
    webhook_port: Annotated[int, typer.Option(help="Port of the webhook; the next free one if taken.")] = 8090,
    postgres: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="DELTAWORKS_POSTGRES",
            show_envvar=True,
            help="Keep Prefect and MLflow there: postgresql://user@host:5432, in databases prefect and mlflow.",
        ),
    ] = None,
) -> None:
    """Start Prefect, MLflow, a worker and the watchers of inboxes, and register the deployments. Ctrl-C ends all.

    Servers that PREFECT_API_URL and MLFLOW_TRACKING_URI name are used and not started. A worker or watcher that ends
    is started again. Logs are in DELTAWORKS_HOME/logs.

    Examples:  deltaworks up --inbox support=./inbox        deltaworks up --line support --zone Europe/Berlin

               deltaworks up --inbox support=s3://models/inbox --webhook-secret webhook.secret
    """
    with errors_explained():
        when = schedules(merge_every, tidy_at, zone)
        database = _databases(postgres) if postgres else ""
        place = open_workplace()
        place.store.objects.ready()
        lines, inboxes = chosen(place, line or [], inbox or [])
        for address in inboxes.values():
            if ":/" not in address:
                Path(address).mkdir(parents=True, exist_ok=True)  # what is copied to it must go into it
        for one in (signal.SIGTERM, signal.SIGINT):  # a supervisor's stop too, and in shells that start with it ignored
            signal.signal(one, signal.default_int_handler)
        children: dict[str, Server] = {}
        try:
            api = _servers(place.settings, host, (prefect_port, mlflow_port), children, database)
            table(registered(lines, {}, when, wanted_pool(pool, "process"), gpu_slots=gpu_slots))
            if "Prefect" in children:  # a server of our own: what ran last time ended with it
                _give_up_lost(pool)
            lost = _give_up_lost if "Prefect" in children else lambda pool: None
            makers = _workers(place.settings, api, pool, limit)
            makers |= _watchers(place.settings, api, inboxes, webhook_secret, webhook_port)
            for name, make in makers.items():
                children[name] = make()
                children[name].await_answer()
            console.print(f"worker   {limit} runs at once, from pool {pool}")
            for name, address in inboxes.items():
                console.print(f"inbox    {address} for line {name}", soft_wrap=True)
            console.print("ready; Ctrl-C ends all")
            sys.stdout.flush()
            _attend(children, makers, lambda: lost(pool))
        except KeyboardInterrupt:
            console.print("stopping ...")
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough: the children must end
            for child in reversed(children.values()):
                child.stop()
        console.print("stopped")


def _give_up_lost(pool: str) -> None:
    from prefect.client.orchestration import get_client

    from flows.deployments import give_up_lost

    with get_client(sync_client=True) as client:
        count = give_up_lost(client, pool)
    if count:
        console.print(f"{count} runs never came to an end: what they left is taken up again")


def _databases(url: str) -> str:
    """Create the databases of both servers; point this process and its children at MLflow's. That of Prefect."""
    from flows.postgres import ensure_databases

    prefect, os.environ["MLFLOW_TRACKING_URI"] = ensure_databases(url)
    return prefect


def _servers(
    settings: Settings, host: str, ports: tuple[int, int], children: dict[str, Server], database: str = ""
) -> str:
    """Start the servers that are not given, and say where they are. The address of Prefect's API."""
    from flows.servers import free_port, start_mlflow, start_prefect

    console.print("starting ...")
    api = os.environ.get("PREFECT_API_URL", "")
    if not api:
        port = free_port(host, ports[0])
        children["Prefect"] = start_prefect(settings, host, port, ui=True, database=database)
        api = os.environ["PREFECT_API_URL"] = f"http://{host}:{port}/api"
    address = settings.tracking
    if not address.startswith("http"):
        port = free_port(host, ports[1])
        children["MLflow"] = start_mlflow(settings, host, port)
        address = f"http://{host}:{port}"
    for child in children.values():
        child.await_answer()
    console.print(f"Prefect  {api.removesuffix('/api')}")
    console.print(f"MLflow   {address}/#/models?workflowType=machine_learning", soft_wrap=True)
    return api


def _workers(settings: Settings, api: str, pool: str, limit: int) -> dict[str, Callable[[], Server]]:
    """How to start those that may be started again."""
    from flows.servers import start_worker

    return {"worker": lambda: start_worker(settings, api, pool, limit)}


def _watchers(
    settings: Settings, api: str, inboxes: dict[str, str], secret_file: str | None, wanted: int
) -> dict[str, Callable[[], Server]]:
    """A process for each inbox, or one for all that also listens."""
    from flows.servers import LOOPBACK, free_port, start_watcher, start_webhook

    if secret_file is None or not inboxes:
        return {
            f"watcher of {line}": lambda line=line, source=source: start_watcher(settings, api, source, line)  # type: ignore[misc]
            for line, source in inboxes.items()
        }
    from flows.deliveries import secrets_of

    secrets_of(secret_file, None)  # before anything is started: a file that is not there is said at once
    secret, port = os.path.abspath(secret_file), free_port(LOOPBACK, wanted)
    console.print(f"webhook  http://{LOOPBACK}:{port}/s3 and /mlflow")
    return {"webhook": lambda: start_webhook(settings, api, inboxes, port, secret)}


def _attend(children: dict[str, Server], makers: dict[str, Callable[[], Server]], lost: Callable[[], None]) -> None:
    """Start again whoever ends, until a server ends or somebody ends too often.

    lost: ends the runs of a worker that ended. One whose process lives on all the same does no harm: merges are kept
    apart by the journal.
    """
    deaths: dict[str, list[float]] = {name: [] for name in makers}
    while True:
        for name, child in list(children.items()):
            if child.running:
                continue
            if name not in makers:
                console.print(f"{name} ended: see {child.log}")
                raise typer.Exit(1)
            deaths[name] = [*deaths[name][-_TIMES + 1 :], time.monotonic()]
            if len(deaths[name]) == _TIMES and deaths[name][-1] - deaths[name][0] < _TIMES * _QUICK:
                console.print(f"{name} ended {_TIMES} times: see {child.log}")
                raise typer.Exit(1)
            console.print(f"{name} ended, and is started again")
            if name == "worker":
                lost()
            children[name] = makers[name]()
        time.sleep(0.5)
