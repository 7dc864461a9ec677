from __future__ import annotations

from collections.abc import Iterator

import pytest

from molmo_edge import EdgeVLM
from molmo_edge.engine.fake import FakeFactory


@pytest.fixture
def vlm(fake: FakeFactory) -> Iterator[EdgeVLM]:
    """An engine of the `fake` of each module."""
    with EdgeVLM(engine=fake) as vlm:
        yield vlm
