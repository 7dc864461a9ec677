"""The real engine with its core in a process of its own, behind the same seam as in the thread.

For applications whose own Python code is busy: it then takes no time from the engine, which needs
the interpreter's lock for every kernel it starts. Pictures are copied to the other process.
"""

from __future__ import annotations

import queue
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from molmo_edge.engine.vllm_engine import VllmEngine
from molmo_edge.errors import EngineError
from molmo_edge.interface import EngineInfo, Rendered, Renderer
from molmo_edge.sampling import Sampling

# How often a wait for the other process looks whether that still lives, in seconds.
_LOOK_S = 0.5
_LAST_S = 5.0


class ProcessEngine(VllmEngine):
    """A `vllm.LLM` whose core runs in a child process, which ends with this one."""

    _turn: AbstractContextManager[object] = nullcontext()  # nothing of the core is in this process

    def __init__(self, llm: Any, renderer: Renderer, info: EngineInfo) -> None:
        super().__init__(llm, renderer, info)
        client = llm.llm_engine.engine_core
        client.get_output = lambda: _next_output(client)

    def add(self, request_id: str, rendered: Rendered, sampling: Sampling) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            super().add(request_id, rendered, sampling)
        except EngineDeadError:
            # The end of the engine, not of one request: the next step says so.
            pass

    def _settle(self) -> None:
        pass

    def _shut_down(self, engine: Any) -> None:
        client = engine.engine_core
        client.shutdown()
        # vLLM leaves its sockets' context behind; once this thread is gone, nobody uses it.
        client.output_queue_thread.join(_LAST_S)
        if not client.output_queue_thread.is_alive():
            client.ctx.destroy(linger=0)


def _next_output(client: Any) -> Any:
    """What vLLM's client does, but a child that was killed ends the wait."""
    while True:
        try:
            outputs = client.outputs_queue.get(timeout=_LOOK_S)
        except queue.Empty:
            if client.resources.engine_dead:
                raise EngineError("The engine's process ended on its own or was killed.") from None
            continue
        if isinstance(outputs, Exception):
            raise client._format_exception(outputs) from None
        return outputs
