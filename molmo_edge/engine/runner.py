"""What the engine's thread does: commands between steps, and steps while there are requests.

Everything here runs in that thread. It knows nothing of states, threads or closing.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import TypeAlias

from molmo_edge.engine.pending import Ticket
from molmo_edge.engine.vllm_errors import mapped
from molmo_edge.engine.watchdog import Watchdog
from molmo_edge.errors import GenerationError, MolmoEdgeError, RequestTimeout
from molmo_edge.interface import Engine

Command: TypeAlias = "Callable[[Runner], None]"
# Ways to end that make a `Result`; None: not ended.
_FINISHED = (None, "stop", "length")


class Runner:
    """Serves the requests of one engine.

    Args:
        inbox: commands from other threads; a SimpleQueue, so that finalizers may put.
        watchdog: told when a step begins and ends.
        on_retired: called once for each request that left, however it ended.

    Attributes:
        engine: None once it is gone.
    """

    def __init__(
        self,
        engine: Engine,
        inbox: queue.SimpleQueue[Command],
        watchdog: Watchdog,
        on_retired: Callable[[], None],
    ) -> None:
        self.engine: Engine | None = engine
        self._inbox = inbox
        self._watchdog = watchdog
        self._on_retired = on_retired
        self._active: dict[str, Ticket] = {}

    def serve(self, leaving: Callable[[bool], bool]) -> None:
        """Steps until `leaving(busy)`; sleeps in the inbox when there is nothing to do.

        Whoever wants it to leave puts a command behind the wish. So between two steps of work
        without a command there is nothing to ask: what stands there, every token pays.
        """
        engine = self.engine
        assert engine is not None
        while True:
            if not self._active and not leaving(False):
                self._inbox.get()(self)
            if not self._active or not self._inbox.empty():
                self._obey()
                if leaving(bool(self._active)):
                    return
            if self._active:
                self._step(engine)

    def end(self, last_word: Callable[[], MolmoEdgeError]) -> Engine | None:
        """Ends every request, those still in the inbox too, and hands the engine back."""
        engine, self.engine = self.engine, None
        self._watchdog.step_began = None
        self._obey()
        for ticket in list(self._active.values()):
            ticket.fail(last_word())
            self._retire(ticket)
        return engine

    # Commands.

    def add(self, ticket: Ticket) -> None:
        """Hands a request to the engine, unless it has ended already."""
        self._active[ticket.request_id] = ticket
        if self.engine is None:
            return  # `end` has a word for it
        rendered = ticket.rendered
        if ticket.done or rendered is None or self._late(ticket, time.monotonic()):
            self._retire(ticket)
            return
        try:
            with mapped("add"):
                self.engine.add(ticket.request_id, rendered, ticket.sampling)
        except MolmoEdgeError as exc:
            ticket.fail(exc)
            self._retire(ticket)
        else:
            ticket.taken()

    def abort(self, ticket: Ticket) -> None:
        """Takes a request that has ended out of the engine, if it is still there."""
        if ticket.request_id in self._active:
            if self.engine is not None:
                self.engine.abort([ticket.request_id])
            self._retire(ticket)

    # Steps.

    def _obey(self) -> None:
        # Nobody else takes from it, so what is there stays there.
        while not self._inbox.empty():
            self._inbox.get_nowait()(self)

    def _step(self, engine: Engine) -> None:
        self._watchdog.step_began = time.monotonic()
        updates = engine.step()
        self._watchdog.step_began = None
        now = time.monotonic()
        for update in updates:
            ticket = self._active.get(update.request_id)
            if ticket is None:
                continue
            if update.finish_reason in _FINISHED:
                ticket.feed(update, now)
            else:
                ticket.feed(update._replace(finish_reason=None), now)
                ticket.fail(GenerationError("The engine gave the request up before its end."))
            if update.finish_reason is not None:
                self._retire(ticket)
        over = []
        for ticket in self._active.values():
            # Those ended by their consumer have a command on its way too, unless Ctrl-C came first.
            if ticket.done or (ticket.deadline is not None and self._late(ticket, now)):
                over.append(ticket)
        for ticket in over:
            self.abort(ticket)

    def _late(self, ticket: Ticket, now: float) -> bool:
        if ticket.deadline is None or now < ticket.deadline:
            return False
        ticket.fail(timed_out())
        return True

    def _retire(self, ticket: Ticket) -> None:
        if self._active.pop(ticket.request_id, None) is not None:
            self._on_retired()


def timed_out() -> RequestTimeout:
    """The error of a request whose deadline passed."""
    return RequestTimeout("The request's deadline passed; `.partial` holds what was generated.")
