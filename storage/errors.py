"""Every error Deltaworks raises on purpose, grouped by what the person or program that catches it should do.

DeltaworksError
├── Unavailable      try again later: the store, the registry or the network did not answer
├── Missing          an object that should be there is not: restore it, or recompute what it came from
├── Damaged          an object is there but is not what its name says: restore it, never use it
├── InvalidInput     what was given cannot work: change it (also a ValueError)
│   └── Mismatch     two things that must fit do not: expected this, found that
├── Unanswered       a question to a model could not be asked: see that its data is there, or ask another
├── Conflict         somebody else was faster, or history says otherwise: look, then choose
└── StoreFull        no room to write: free some, then run again
"""

from __future__ import annotations


class DeltaworksError(Exception):
    """The root. `remedy` says what to do next; it becomes the last sentence of the message."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        self.remedy = remedy
        super().__init__(f"{message}. {remedy}" if remedy else message)

    def __reduce__(self) -> tuple[object, ...]:
        # Prefect moves exceptions between threads and processes by pickling them. The default rebuilds from `args`,
        # which already holds the remedy and would lose the attribute.
        return (rebuilt, (type(self), str(self), self.remedy))


def rebuilt(cls: type[DeltaworksError], text: str, remedy: str) -> DeltaworksError:
    error = cls.__new__(cls)
    Exception.__init__(error, text)
    error.remedy = remedy
    return error


class Unavailable(DeltaworksError):
    """A service did not answer, or asked for patience. The only error that is retried."""


class Missing(DeltaworksError):
    """An object that was named is not in the store."""


class Damaged(DeltaworksError):
    """Stored bytes do not have the digest that names them, or cannot be parsed."""


class InvalidInput(DeltaworksError, ValueError):
    """A configuration, file or argument that can never work."""


class Mismatch(InvalidInput):
    """Two inputs that must fit together do not."""

    def __init__(self, what: str, *, expected: object, found: object, remedy: str = "") -> None:
        super().__init__(f"{what}: expected {expected}, found {found}", remedy=remedy)


class Unanswered(DeltaworksError):
    """The exam of a line could not be held: that is no fault of what is examined."""


class Conflict(DeltaworksError):
    """A write-once name is already taken by different content."""


class StoreFull(DeltaworksError):
    """The store has no room left."""
