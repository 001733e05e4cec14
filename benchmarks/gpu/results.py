"""What came of the kit, item by item: an item that fails stops no other."""

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

PASS, FAIL, NUMBER, SKIPPED = "pass", "FAIL", "number", "skipped"


class Skipped(Exception):
    """An item cannot run here; the text says why."""


@dataclass(frozen=True)
class Outcome:
    """What an item came to.

    Attributes:
        status: ``pass``, ``FAIL``, ``number`` (something was measured) or ``skipped``.
        says: one line.
        details: for the JSON, and for the items that build on this one.
    """

    status: str
    says: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """A row of the report: an outcome, and whose it is."""

    stage: str
    name: str
    status: str
    says: str
    seconds: float
    details: dict[str, Any]


class Results:
    """The items so far.

    Args:
        on_item: called after every one, so that a kit that is ended keeps what it has.
        minutes: after which no item starts; None is no limit.
        clock: seconds.
    """

    def __init__(
        self,
        on_item: Callable[[Item], None] = lambda item: None,
        minutes: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.items: list[Item] = []
        self._on_item, self._clock = on_item, clock
        self._end = None if minutes is None else clock() + 60 * minutes

    def left_s(self, most: float) -> float:
        """``most`` seconds, or what is left of the time if that is less."""
        return most if self._end is None else max(0.0, min(most, self._end - self._clock()))

    def attempt(
        self, stage: str, name: str, action: Callable[[], Outcome]
    ) -> dict[str, Any] | None:
        """Run one item and keep what came of it, a failure too.

        Returns:
            Its details; None where it failed or was skipped.
        """
        began = self._clock()
        try:
            if not self.left_s(1.0):
                raise Skipped("no time left")
            outcome = action()
        except Skipped as reason:
            outcome = Outcome(SKIPPED, str(reason))
        except Exception as error:  # whatever it is, the items after this one are to run
            details = {"traceback": traceback.format_exc()}
            outcome = Outcome(FAIL, f"{type(error).__name__}: {error}".splitlines()[0], details)
            if not self.left_s(1.0):
                cut = f"cut when the time was over: {error}".splitlines()[0]
                outcome = Outcome(SKIPPED, cut, details)
        seconds = self._clock() - began
        item = Item(stage, name, outcome.status, outcome.says, seconds, outcome.details)
        self.items.append(item)
        self._on_item(item)
        return None if outcome.status in (FAIL, SKIPPED) else outcome.details

    def skip(self, stage: str, name: str, reason: str) -> None:
        """Keep that an item did not run, and why."""

        def skipped() -> Outcome:
            raise Skipped(reason)

        self.attempt(stage, name, skipped)

    @property
    def failed(self) -> list[Item]:
        """The items that failed."""
        return [item for item in self.items if item.status == FAIL]

    def as_list(self) -> list[dict[str, Any]]:
        """For the JSON."""
        return [asdict(item) for item in self.items]
