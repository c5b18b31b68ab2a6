"""Reading: what people name on the command line, a YAML file or one that comes with the product, as plain values."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from storage.errors import InvalidInput


def named_in(folder: Path) -> list[str]:
    """The files of a folder that comes with the product, by the names that stand for them."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def read_yaml(source: str | Path, folder: Path, what: str) -> tuple[Path, Any]:
    """A YAML file and its values: `source` itself, or the one of that name in `folder`, of which each is a `what`."""
    path = _find(source, folder, what)
    try:
        return path, yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InvalidInput(f"{path} is not YAML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}") from error


def _find(source: str | Path, folder: Path, what: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    own = folder / f"{source}.yaml"
    if own.is_file():
        return own
    known = named_in(folder)
    close = difflib.get_close_matches(str(source), known, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise InvalidInput(f"there is no file {str(source)!r}", remedy=f"{hint}{what}: {', '.join(known)}")
