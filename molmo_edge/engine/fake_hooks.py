"""Where a fake engine's calls fail, wait, and are counted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """An exception that a call raises.

    Attributes:
        call: ``"build"``, ``"render"``, ``"add"``, ``"step"``, ``"abort"``, ``"reset_caches"`` or
            ``"close"``.
        error: what is raised.
        number: which of these calls fails, counted from 1 over all engines of a factory; None
            for all.
    """

    call: str
    error: BaseException
    number: int | None = None


class Hooks:
    """Shared by the engines of one factory; its methods may be called from any thread.

    Attributes:
        calls: how often each call has begun.
        holds: call name → event that the call waits for.
    """

    def __init__(
        self, faults: Sequence[Fault] = (), holds: Mapping[str, threading.Event] | None = None
    ) -> None:
        self.calls: Counter[str] = Counter()
        self._faults = tuple(faults)
        self.holds = dict(holds or {})
        self._changed = threading.Condition()

    def enter(self, call: str) -> None:
        """Counts the call, waits where it is held, and raises its fault."""
        with self._changed:
            self.calls[call] += 1
            number = self.calls[call]
            self._changed.notify_all()
        if call in self.holds:
            self.holds[call].wait()
        for fault in self._faults:
            if fault.call == call and fault.number in (None, number):
                raise fault.error

    def wait_for(self, call: str, count: int, timeout: float) -> None:
        """Waits until the call has begun `count` times. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.calls[call] >= count, timeout):
                raise TimeoutError(
                    f"{call}() began {self.calls[call]} times in {timeout:g} s, not {count}."
                )
