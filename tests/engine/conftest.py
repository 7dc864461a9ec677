"""A test that leaves a thread behind fails."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest

_PATIENCE_S = 10.0


@pytest.fixture(autouse=True)
def no_leaked_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("engine") is not None:
        # vLLM's own threads come and go, and the session's engines stay.
        yield
        return
    before = set(threading.enumerate())
    yield
    end, collected = time.monotonic() + _PATIENCE_S, False
    while left := [t for t in threading.enumerate() if t not in before]:
        if time.monotonic() > end:
            pytest.fail(f"threads left behind: {sorted(t.name for t in left)}")
        time.sleep(0.005)
        if not collected:
            collected = bool(gc.collect())
