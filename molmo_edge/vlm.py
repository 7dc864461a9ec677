"""`EdgeVLM`: the one class users meet. It only joins the other rooms of the house."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from molmo_edge.checkpoint_files import read_config
from molmo_edge.devices.detect import DeviceInfo
from molmo_edge.devices.plan import Plan, plan
from molmo_edge.devices.profiles import load_profile, select_profile
from molmo_edge.devices.shapes import ModelShape
from molmo_edge.engine.build import (
    build,
    engine_device,
    engine_environment,
    plan_build,
    quiet,
    require_vllm,
    set_environment,
)
from molmo_edge.engine.loop import EngineLoop, State
from molmo_edge.engine.pool import RenderPool
from molmo_edge.errors import ConfigError, EngineClosedError
from molmo_edge.images import ImageLimits
from molmo_edge.interface import Engine, ModelFamily
from molmo_edge.models.hub import default_cache_dir, locate
from molmo_edge.models.registry import family_of
from molmo_edge.requests import Request
from molmo_edge.settings import EdgeSettings, Resolved, resolve
from molmo_edge.verbs import Verbs
from molmo_edge.warmup import WarmupReport, warm

__all__ = ["EdgeVLM", "Request"]

T = TypeVar("T")


class EdgeVLM(Verbs):
    """A vision-language model in this process.

    Safe to use from many threads and from asyncio at once: one engine thread serves them all.

    Args:
        model: checkpoint folder, hub name, or ``"stub"`` (the default: real architecture, made-up
            weights, no download).
        config: a TOML file of settings.
        profile: device profile by name; found out when not given.
        engine: ``"thread"`` (the default) or ``"process"``, the setting of that name; or what
            builds another engine than vLLM's, such as `molmo_edge.engine.fake.FakeEngine`, called
            in the engine's thread. Model and device settings then mean nothing.
        engine_args: further arguments of `vllm.LLM`, as given.
        settings: any field of `EdgeSettings`. Arguments beat the environment (`MOLMO_EDGE_*`),
            which beats `.env`, which beats the config file, which beats the profile.

    Raises:
        ConfigError: a setting is unknown or wrong.
        ModelError: no such checkpoint, or a layout that is not supported.
        MissingDependencyError: no vLLM is installed.
        EngineStartError: vLLM could not be started; the cause is chained.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        config: str | Path | None = None,
        profile: str | None = None,
        precision: str | None = None,
        kv_cache_dtype: str | None = None,
        dtype: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_crops: int | None = None,
        load_format: str | None = None,
        seed: int | None = None,
        engine_args: Mapping[str, Any] | None = None,
        engine: str | Callable[[], Engine] | None = None,
        **settings: Any,
    ) -> None:
        began = time.perf_counter()
        self.device: DeviceInfo = engine_device()
        self._shape: ModelShape | None = None
        resolved = resolve(
            {
                "model": None if model is None else str(model),
                "profile": profile,
                "precision": precision,
                "kv_cache_dtype": kv_cache_dtype,
                "dtype": dtype,
                "max_model_len": max_model_len,
                "max_num_seqs": max_num_seqs,
                "max_crops": max_crops,
                "load_format": load_format,
                "seed": seed,
                "engine_args": None if engine_args is None else dict(engine_args),
                "engine": None if callable(engine) else engine,
                **settings,
            },
            config=config,
            profile_settings=self._load_profile,
        )
        self.settings: EdgeSettings = resolved.settings
        self.family: ModelFamily | None = None
        self._limits = ImageLimits(self.settings.max_image_bytes, self.settings.max_image_pixels)
        self._factory = engine if callable(engine) else self._vllm_factory(resolved, began)
        self._ids = itertools.count()
        self._pool = RenderPool()
        self._closed = False
        self._restarting = threading.Lock()
        self._dropped: weakref.finalize[..., EdgeVLM] | None = None
        self._start()

    # The engine.

    @property
    def state(self) -> State:
        """Where the engine stands: new, starting, ready, stalled, closing, closed or dead."""
        return self._loop.state

    @property
    def cause(self) -> BaseException | None:
        """What killed the engine, None while it is not dead."""
        return self._loop.cause

    @property
    def environment(self) -> Mapping[str, Any]:
        """Versions, device and settings that answers come from."""
        return self._loop.engine.info.environment

    @property
    def startup(self) -> Mapping[str, float | None]:
        """Seconds of each part of the start, None for what is not known; see `EngineInfo`."""
        return self._loop.engine.info.startup_s

    def plan(self, **request: Any) -> Plan:
        """What this device can do with this checkpoint: memory, and ceilings of its speed.

        Args:
            request: `prompt_tokens`, `output_tokens`, `lengths`, `batch` or `bandwidth_bytes_s` of
                `molmo_edge.devices.plan.plan`.

        Raises:
            ConfigError: a count below 1, or the engine is not vLLM's and has no checkpoint.
        """
        if self._shape is None:
            raise ConfigError("plan() needs a checkpoint, and this engine was built without one.")
        mine = {"kv_cache_dtype": self.settings.kv_cache_dtype, "batch": self.settings.max_num_seqs}
        return plan(self._shape, self.device, profile=self._profile, **{**mine, **request})

    def warmup(self, *, tokens: int = 32, max_rounds: int = 10) -> WarmupReport:
        """Runs the shapes that requests will have, until decode speed is steady.

        After it no request pays for kernels, graphs or caches that the first of its kind needs.

        Args:
            tokens: generated in each request, 2 or more; fewer where `max_model_len` is short.
            max_rounds: most decode speeds to measure, 2 or more.

        Raises:
            MolmoEdgeError: as `query`.
        """
        return warm(self, tokens=tokens, max_rounds=max_rounds)

    def reset_caches(self) -> None:
        """Empties prefix, picture and encoder caches, between steps."""
        self.in_engine_thread(lambda engine: engine.reset_caches())

    def in_engine_thread(self, function: Callable[[Any], T]) -> T:
        """Runs `function(engine)` between steps in the thread that owns the engine.

        For what this class does not offer: with vLLM, ``engine.llm`` is the `vllm.LLM`.
        """
        return self._loop.call(function)

    def restart(self) -> None:
        """Frees the engine, dead or alive, and builds a new one with the same settings.

        Raises as the constructor; EngineClosedError behind `close`.
        """
        self._loop.check_may_wait()
        with self._restarting:
            if not self._closed:
                self._loop.close()
                self._start()
                return
        raise EngineClosedError("The engine is closed; an engine cannot be reopened.")

    def close(self, timeout: float | None = None, *, drain: bool = False) -> bool:
        """Ends the engine and gives its memory back; from any thread, any number of times.

        Args:
            timeout: most seconds to wait; None for as long as it takes.
            drain: let requests in flight finish; otherwise they end with EngineClosedError.

        Returns:
            Whether the engine is gone. With False it goes as soon as its current step ends.
        """
        self._closed = True
        gone = self._loop.close(timeout, drain=drain)
        if gone and self._loop.own:
            self._pool.close(timeout)
        return gone

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _load_profile(self, asked: str) -> tuple[str, dict[str, Any]]:
        self._profile = select_profile(self.device)[0] if asked == "auto" else load_profile(asked)
        return self._profile.name, self._profile.as_settings()

    def _vllm_factory(self, resolved: Resolved, began: float) -> Callable[[], Engine]:
        require_vllm()
        quiet()
        settings = self.settings
        set_environment(engine_environment(settings, self.device, self._profile))
        root = settings.cache_dir or default_cache_dir()
        folder = locate(settings.model, root, settings.load_format)
        config = read_config(folder)
        self.family = family_of(config)
        self.family.check(config, folder, settings.load_format)
        ready = plan_build(resolved, self.device, self.family, folder, config, self._profile)
        self._shape = ready.shape
        # A restart finds all of this done.
        spent = iter([time.perf_counter() - began])
        return lambda: build(ready, next(spent, 0.0))

    def _start(self) -> None:
        loop = self._loop = EngineLoop(
            self._factory, max_queue=self.settings.max_queue, stall_s=self.settings.stall_s
        )
        if self._closed:  # by another thread, which did not see this loop
            loop.close()
        try:
            loop.start()
        except BaseException:
            loop.close(timeout=0)
            raise
        if self._dropped is not None:
            self._dropped.detach()
        self._dropped = weakref.finalize(self, loop.abandon_engine)
        # At exit loop.py closes what is left.
        self._dropped.atexit = False
