"""Postgres: the databases of Prefect's and MLflow's servers on a server of that kind, made when they are missing."""

from __future__ import annotations

import asyncio
import importlib.util
from urllib.parse import urlsplit, urlunsplit

from storage.errors import InvalidInput, Unavailable

PREFECT, MLFLOW = "prefect", "mlflow"  # the names of the databases


def ensure_databases(url: str) -> tuple[str, str]:
    """The addresses of the two databases for Prefect and for MLflow, of the server at `postgresql://user@host:port`."""
    parts = urlsplit(url)
    if parts.scheme not in ("postgresql", "postgres") or parts.path.strip("/"):
        raise InvalidInput(
            "the address of Postgres must name a server and no database",
            remedy="Write it like postgresql://user@host:5432; keep a password out of the command: DELTAWORKS_POSTGRES",
        )
    if importlib.util.find_spec("psycopg2") is None:
        raise InvalidInput("MLflow needs psycopg2 for Postgres", remedy="pip install 'deltaworks[postgres]'")
    asyncio.run(_create(url, (PREFECT, MLFLOW)))
    return (
        urlunsplit(parts._replace(scheme="postgresql+asyncpg", path=f"/{PREFECT}")),
        urlunsplit(parts._replace(scheme="postgresql", path=f"/{MLFLOW}")),
    )


async def _create(url: str, names: tuple[str, ...]) -> None:
    import asyncpg  # type: ignore[import-untyped]  # comes with prefect

    try:
        connection = await asyncpg.connect(url, database="postgres", timeout=10)
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        said = str(error) or type(error).__name__
        raise Unavailable(f"Postgres at {urlsplit(url).hostname} does not let us in: {said}") from error
    try:
        known = {row["datname"] for row in await connection.fetch("SELECT datname FROM pg_database")}
        for name in names:
            if name not in known:
                await connection.execute(f'CREATE DATABASE "{name}"')
    finally:
        await connection.close()
