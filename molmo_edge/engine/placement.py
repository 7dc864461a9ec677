"""Where the core of an engine runs: in the thread that builds it, or in a child process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from molmo_edge.errors import ConfigError

_IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
# Told to the child: who builds the engine, and the family to prepare. Not MOLMO_EDGE_…, where
# users' settings live.
_CHILD = "_MOLMO_EDGE_ENGINE_OF"
_PR_SET_PDEATHSIG = 1


@contextmanager
def in_thread() -> Iterator[None]:
    """While this lasts, `vllm.LLM` runs its core in the calling thread."""
    with _changed({_IN_PROCESS: "0"}):
        yield


@contextmanager
def in_process(family: str) -> Iterator[None]:
    """While this lasts, `vllm.LLM` starts its core in a new process, prepared for the family.

    Raises ConfigError in a process that is itself just being started that way.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(
            "engine=process starts Python anew, which imports the main script again: put the "
            'script\'s own code under `if __name__ == "__main__":`.'
        )
    values = {
        _IN_PROCESS: "1",
        # A forked child of a process with threads may find their locks held for good.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        _CHILD: f"{os.getpid()} {family}",
    }
    with _changed(values):
        yield


def prepare_child() -> None:
    """What an engine's own process needs; vLLM's plugin calls it in every process."""
    pid, _, family = os.environ.get(_CHILD, "").partition(" ")
    if not family or int(pid) == os.getpid():
        return
    from molmo_edge.engine.build import quiet
    from molmo_edge.models.registry import by_name

    quiet()
    # Ctrl-C reaches every process of the terminal; what it ends, the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    by_name(family).prepare()


def _end_with_parent() -> None:
    """A parent that is killed must not leave a process that holds the device's memory."""
    parent = multiprocessing.parent_process()
    if sys.platform == "linux" and parent is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:  # it died before that was said
            os._exit(1)


@contextmanager
def _changed(values: Mapping[str, str]) -> Iterator[None]:
    """The environment with other values, whatever the user set for other vLLMs."""
    from vllm import envs

    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    # vLLM keeps what it read once an engine is up.
    envs.disable_envs_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        envs.disable_envs_cache()
        envs.enable_envs_cache()
