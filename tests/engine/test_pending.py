"""Waiting for a shared state, and what one request makes of its updates."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from molmo_edge.engine.pending import PendingRequest, Waiters
from molmo_edge.interface import Rendered, Update
from molmo_edge.sampling import Sampling
from tests.engine.support import eventually, in_threads

pytestmark = pytest.mark.timeout(30)


def wait_in_task(waiters: Waiters, ready: Callable[[], bool], timeout: float | None = None) -> bool:
    return asyncio.run(waiters.async_wait(ready, timeout))


WAITS = pytest.mark.parametrize("wait", [Waiters.wait, wait_in_task])


@WAITS
def test_a_wake_between_looking_and_waiting_is_not_lost(wait: Callable[..., bool]) -> None:
    waiters, looks = Waiters(), 0

    def ready() -> bool:
        nonlocal looks
        looks += 1
        if looks == 1:
            waiters.wake()  # the state changes after this look
        return looks > 1

    assert wait(waiters, ready)
    assert waiters._wakes == []


@WAITS
def test_every_waiter_looks_again_after_a_wake(wait: Callable[..., bool]) -> None:
    waiters, ready = Waiters(), threading.Event()

    def wake() -> None:
        eventually(lambda: len(waiters._wakes) == 4)
        waiters.wake()  # nothing has changed: all of them wait on
        ready.set()
        waiters.wake()

    in_threads([*[lambda: wait(waiters, ready.is_set)] * 4, wake])
    assert waiters._wakes == []


@WAITS
def test_waiting_ends_in_time_and_leaves_nothing(wait: Callable[..., bool]) -> None:
    waiters = Waiters()
    assert wait(waiters, lambda: True, 0.0)
    assert not wait(waiters, lambda: False, 0.01)

    def interrupted() -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        wait(waiters, interrupted)
    assert waiters._wakes == []


@pytest.mark.parametrize(
    ("prefix", "pieces", "answer"),
    [
        (" ", [" a", " b"], "a b"),
        (" ", [" ", " a"], " a"),
        (" ", ["", " ", "", "a "], "a "),
        (" ", ["a", " b"], "a b"),
        ("", [" a", " b"], " a b"),
        ("Answer: ", ["Ans", "wer", ": ", "Answer: "], "Answer: "),
        ("Answer: ", ["Ans", "el"], "Ansel"),
        ("Answer: ", ["Ans"], "Ans"),
        (" ", [], ""),
    ],
)
def test_the_prefix_of_an_answer_is_removed_once(
    prefix: str, pieces: list[str], answer: str
) -> None:
    request = PendingRequest("r", Rendered(None, answer_prefix=prefix), Sampling(), started=0.0)
    for piece in pieces[:-1]:
        request.feed(Update("r", piece, (1,)), 1.0)
        assert answer.startswith(request.text)
    request.feed(Update("r", "".join(pieces[-1:]), (2,), finish_reason="stop"), 2.0)
    assert request.result().text == answer
