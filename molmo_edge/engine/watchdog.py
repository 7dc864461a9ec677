"""A thread that notices when an engine step lasts too long; it shares no lock with the step."""

from __future__ import annotations

import logging
import queue
import threading
import time

logger = logging.getLogger("molmo_edge")


class Watchdog:
    """Reports a step that lasts longer than `stall_s` seconds, once for each such step.

    Attributes:
        step_began: when the step in progress began, on the monotonic clock; None between steps.
            Written by the engine's thread alone.
        report: what is said of a stall.
    """

    def __init__(self, stall_s: float) -> None:
        self.step_began: float | None = None
        self.report = f"One engine step has lasted longer than {stall_s:g} s; it may be stuck."
        self._stall_s = stall_s
        self._over: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="molmo-edge-watchdog", daemon=True)

    @property
    def stalled(self) -> bool:
        """Whether a step has lasted too long by now."""
        return self._late(self.step_began)

    def start(self) -> None:
        """Raises RuntimeError when no thread can be started."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; from any thread."""
        self._over.put(None)

    def join(self) -> None:
        """Waits for the thread, if it ever ran."""
        if self._thread.ident is not None:
            self._thread.join()

    def _late(self, began: float | None) -> bool:
        return began is not None and time.monotonic() - began > self._stall_s

    def _run(self) -> None:
        reported: float | None = None
        while True:
            try:
                self._over.get(timeout=min(1.0, self._stall_s / 4))
                return
            except queue.Empty:
                began = self.step_began
            if self._late(began) and began != reported:
                reported = began
                logger.error("%s", self.report)
