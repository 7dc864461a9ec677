"""`engine="process"`: vLLM's `AsyncLLM`, whose core runs in a child process, behind `Engine`.

For applications whose own Python code is busy: it then takes no time from the engine, which needs
the interpreter's lock for every kernel it starts. Image tensors are copied to the child.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from molmo_edge.engine.vllm_engine import (
    VllmEngine,
    engine_prompt,
    environment,
    release_memory,
    sampling_params,
)
from molmo_edge.errors import ConfigError, EngineClosedError, EngineError
from molmo_edge.interface import Rendered, Update
from molmo_edge.sampling import Sampling

T = TypeVar("T")

# Tells the child its parent and the model family. Not MOLMO_EDGE_…, the prefix of settings.
_CHILD = "_MOLMO_EDGE_ENGINE_OF"
_PR_SET_PDEATHSIG = 1
# Seconds for the child to end, then it is killed; to answer a call; and between two looks at
# whether the engine is to be closed.
_CLOSE_S, _ANSWER_S, _LOOK_S = 15.0, 120.0, 0.5


def require_main_guard() -> None:
    """Raise ConfigError in a child process that is still importing the main script."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(
            'engine="process" starts a new Python, which imports the main script again: put the '
            'script\'s own code under `if __name__ == "__main__":`.'
        )


def start(args: Mapping[str, Any], family: str, abandoned: Callable[[], bool]) -> AsyncEngine:
    """Build `AsyncLLM` on an event loop of the calling thread; once `abandoned()`, give up."""
    values = {
        # A forked child of a process with threads may find their locks held for ever.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        _CHILD: f"{os.getpid()} {family}",
    }
    runner = asyncio.Runner()
    try:
        with environment(values), killing_children_once(abandoned):
            return AsyncEngine(runner.run(_start(args)), runner)
    except BaseException:
        runner.close()
        if abandoned():
            raise EngineClosedError("The engine was closed while it started.") from None
        raise


@contextmanager
def killing_children_once(abandoned: Callable[[], bool]) -> Iterator[None]:
    """Kill what vLLM starts in the block once `abandoned()`, as nothing interrupts its start."""
    before, ended = multiprocessing.active_children(), threading.Event()

    def watch() -> None:
        while not ended.wait(_LOOK_S):
            for child in multiprocessing.active_children() if abandoned() else ():
                if child not in before and child.name.startswith("EngineCore"):
                    child.kill()

    watcher = threading.Thread(target=watch, name="molmo-edge-start", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


async def _start(args: Mapping[str, Any]) -> Any:
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    args = dict(args)
    structured = args.get("structured_outputs_config")
    if isinstance(structured, Mapping):  # `vllm.LLM` does this by itself
        args["structured_outputs_config"] = StructuredOutputsConfig(**structured)
    # As `vllm.LLM`, which schedules other numbers of tokens in a step than a server.
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args), usage_context=UsageContext.LLM_CLASS)
    await llm.get_supported_tasks()
    return llm


def prepare_child() -> None:
    """Prepare a process that `start` started; vLLM's plugin calls it in every process."""
    pid, _, family = os.environ.get(_CHILD, "").partition(" ")
    if not family or int(pid) == os.getpid():
        return
    from molmo_edge.models.registry import family_of
    from molmo_edge.models.vllm_workarounds import ignore_scan_warning

    ignore_scan_warning()
    # Ctrl-C reaches every process of the terminal; the parent decides what it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A killed parent must not leave a process that holds the device's memory.
    parent = multiprocessing.parent_process()
    if sys.platform == "linux" and parent is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:  # it died before the call
            os._exit(1)
    family_of({"model_type": family}).prepare()


class AsyncEngine(VllmEngine):
    """Drives an event loop from the engine's thread; between calls the loop stands still.

    Attributes:
        llm: the `AsyncLLM`, None after `close`; await its methods with `run`.
    """

    def __init__(self, llm: Any, runner: asyncio.Runner) -> None:
        super().__init__(llm, llm)
        self._runner = runner
        self._loop = runner.get_loop()
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._updates: list[Update] = []
        self._cause: Exception | None = None
        # Set when there are updates, or a cause.
        self._wake = asyncio.Event()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = _ANSWER_S) -> T:
        """Run a coroutine on the engine's loop.

        Raises EngineError if the child dies meanwhile or does not answer in time.
        """
        return self._loop.run_until_complete(self._answered(coroutine, timeout_s))

    def add(self, request_id: str, rendered: Rendered, sampling: Sampling) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt, params = engine_prompt(rendered), sampling_params(sampling, self.speculative)
        try:
            outputs = self.run(self.llm.add_request(request_id, prompt, params))
        except (EngineDeadError, EngineError) as exc:
            # The end of the engine, not of one request: the next step raises it.
            self._cause = exc
        except BaseException:
            self.abort([request_id])
            raise
        else:
            self._readers[request_id] = self._loop.create_task(self._read(request_id, outputs))

    def step(self) -> list[Update]:
        if not self._updates and self._cause is None:
            # No longer, for a child that hangs: the loop has cancels, deadlines and closes to see.
            look = self._loop.call_later(_LOOK_S, self._wake.set)
            self._loop.run_until_complete(self._wake.wait())
            look.cancel()
        self._wake.clear()
        updates, self._updates = self._updates, []
        if self._cause is not None and not updates:
            raise self._cause
        return updates

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if (reader := self._readers.pop(request_id, None)) is not None:
                reader.cancel()
        self._loop.run_until_complete(self.llm.abort(list(request_ids)))

    def reset_caches(self) -> None:
        self.run(self.llm.reset_prefix_cache())
        self.run(self.llm.reset_mm_cache())
        self.run(self.llm.reset_encoder_cache())

    def close(self) -> None:
        llm, self.llm, self.core, self.renderer = self.llm, None, None, None
        context = llm.engine_core.resources.ctx
        try:
            self._loop.run_until_complete(_shut_down(llm))
        finally:
            self._runner.close()
            # vLLM leaves the sockets' context, with its threads, to the garbage collector.
            context.destroy(linger=0)
            del llm
            multiprocessing.active_children()  # reaps a child that had to be killed
            release_memory()

    async def _read(self, request_id: str, outputs: Any) -> None:
        """Collect what vLLM produces for one request."""
        finished = False
        try:
            while not finished:
                output = outputs.get_nowait() or await outputs.get()
                finished = output.finished
                self._updates.append(self.to_update(output))
                self._wake.set()
        except Exception as exc:  # vLLM hands every reader the end of the engine
            self._cause = exc
            self._wake.set()
        finally:
            self._readers.pop(request_id, None)

    async def _answered(self, coroutine: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Await a call to the child, whose answer never comes if it dies or hangs."""
        call = asyncio.ensure_future(coroutine)
        tasks = {call, self.llm.output_handler}
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if call.done():
            return call.result()
        call.cancel()
        dead = self.llm.output_handler.done()
        self._cause = EngineError(
            "The engine's process ended during the call."
            if dead
            else f"The engine's process did not answer a call within {timeout_s:g} s."
        )
        raise self._cause


async def _shut_down(llm: Any) -> None:
    """Inside the event loop, so that vLLM closes its sockets at once."""
    llm.shutdown(timeout=_CLOSE_S)
