"""Told: what the processes of a training say to the one that waits for them, in files of a folder that both know."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from storage import errors
from storage.errors import DeltaworksError

Report = Callable[[int, int, str], None]

_SHOWN = 15  # lines of what was printed, if nothing better is known of a failure
_PROGRESS, _RESULT = "progress.jsonl", "result.json"  # not printed: what several print may run into each other


def tell_progress(folder: Path, done: int, total: int, note: str) -> None:
    with (folder / _PROGRESS).open("a") as lines:
        lines.write(json.dumps([done, total, note]) + "\n")


def tell_result(folder: Path, ref: str) -> None:
    _write(folder / _RESULT, {"ref": ref})


def tell_error(folder: Path, rank: int, error: Exception) -> None:
    known = {"at": time.time(), "rank": rank, "kind": type(error).__name__}
    _write(folder / f"error-{rank}.json", {**known, "message": str(error), "remedy": getattr(error, "remedy", "")})


def result(folder: Path) -> str | None:
    """The ref that was stored, if the training came to its end."""
    file = folder / _RESULT
    return str(json.loads(file.read_text())["ref"]) if file.exists() else None


def _write(file: Path, values: dict[str, object]) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(values))
    part.rename(file)


class Progress:
    """Passes on what the leading process has reported."""

    def __init__(self, folder: Path, report: Report) -> None:
        self._file, self._report, self._read = folder / _PROGRESS, report, 0

    def look(self) -> None:
        if not self._file.exists():
            return
        with self._file.open("rb") as lines:
            lines.seek(self._read)
            whole, end, _ = lines.read().rpartition(b"\n")
        self._read += len(whole) + len(end)
        for line in whole.splitlines():
            self._report(*json.loads(line))


def failure(folder: Path, processes: int, code: int, printed: Sequence[str]) -> DeltaworksError:
    """The error of the process that failed first; without one, how it ended, and the last that was printed.

    A process that was killed says nothing, and those that worked with it complain of that.
    """
    told = sorted((json.loads(file.read_text()) for file in folder.glob("error-*.json")), key=lambda one: one["at"])
    ours = next((one for one in told if hasattr(errors, one["kind"])), None)
    if ours is not None:
        return errors.rebuilt(getattr(errors, ours["kind"]), ours["message"], ours["remedy"])
    text = "\n".join(printed)
    found = re.search(r"Root Cause.*?\brank +: (\d+).*?\bexitcode +: (-?\d+)", text, re.DOTALL)
    who, code = (f"process {found[1]}", int(found[2])) if found else ("the launcher", code)
    if told and code >= 0:
        first = told[0]
        return DeltaworksError(f"process {first['rank']} of {processes} failed: {first['kind']}: {first['message']}")
    how = f"{who} ended by signal {-code}" if code < 0 else f"{who} ended with exit code {code}"
    return DeltaworksError(
        f"a training in {processes} processes ended without saying why: {how}{_own_words(printed)}",
        remedy="Most often memory ran out. What was saved is kept: run it again, with a smaller batch if need be",
    )


def _own_words(printed: Sequence[str]) -> str:
    """The last lines of the processes, without what the launcher says of them."""
    ours = itertools.takewhile(lambda line: not line.startswith("Traceback"), printed)
    words = [line for line in ours if not re.match(r"[WE]\d{4} |\[rank", line)][-_SHOWN:]
    return "\n".join(["", *words, ""]) if words else ""
