"""A doctor's look at the machine: GPU, profile, memory, power and caches on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from molmo_edge.devices.caches import Cache
from molmo_edge.devices.findings import Finding
from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.nvml import visible_gpu
from molmo_edge.devices.precision import DEFAULT_UTILIZATION, choose_precision
from molmo_edge.devices.profiles import Profile, profile_warning
from molmo_edge.devices.shapes import model_shape
from molmo_edge.devices.sources import Sources
from molmo_edge.devices.specs import GIB
from molmo_edge.errors import ConfigError

_MODEL = "allenai/Molmo-7B-D-0924"


def device_findings(src: Sources, device: DeviceInfo) -> Iterator[Finding]:
    if device.kind == "cuda":
        traits = [device.sm or "capability unknown", _memory(device)]
        traits += [f"driver {device.driver}"] if device.driver else []
        traits += [f"CUDA {device.cuda}"] if device.cuda else []
        yield Finding("ok", "GPU", f"{device.name}, {', '.join(traits)}")
    else:
        isa = ", ".join(sorted(device.cpu_isa & {"avx2", "avx512f", "avx512_bf16", "amx_bf16",
                                                 "neon", "bf16", "sve"}))  # fmt: skip
        detail = f"none; {device.cpu_name or 'processor unknown'} ({isa or 'instructions unknown'})"
        yield Finding("note", "GPU", detail)
    if device.kind == "cpu" and visible_gpu(src) is None:
        yield Finding(
            "warn",
            "CUDA_VISIBLE_DEVICES",
            "hides every GPU from this process",
            "unset it, or set it to 0",
        )
    elif device.kind == "cpu" and device.jetson_model is not None:
        yield Finding(
            "problem",
            "GPU access",
            f"this is a {device.jetson_model}, but its GPU is not in this container",
            "start the container with --runtime nvidia (or --gpus all)",
        )
    if device.nvml_error is not None:
        yield Finding(
            "warn" if device.kind == "cuda" and not device.assumed else "problem",
            "NVML",
            f"is installed but fails: {device.nvml_error}",
            "reboot after a driver update; in a container, make sure its NVIDIA libraries come "
            "from the host (--gpus all, NVIDIA_DRIVER_CAPABILITIES=compute,utility)",
        )
    elif device.assumed:
        yield Finding(
            "note",
            "NVML",
            f"does not answer: {', '.join(device.assumed)} taken from published figures",
            "add utility to NVIDIA_DRIVER_CAPABILITIES",
        )
    if device.is_wsl:
        yield Finding(
            "note",
            "WSL",
            "clocks and power belong to Windows, and pinned memory is limited",
            "set power and clocks there; compare speeds with native Linux before trusting them",
        )
    if device.kind == "cuda" and device.memory_bandwidth_bytes_s is None:
        yield Finding(
            "note",
            "Ceilings",
            f"no published figures for {device.name} are known, so plans have no ceilings",
        )


def profile_findings(device: DeviceInfo, profile: Profile, reason: str) -> Iterator[Finding]:
    warning = profile_warning(profile, device)
    if warning is not None:
        yield Finding("warn", "Profile", warning, "use profile auto")
    else:
        yield Finding("ok", "Profile", reason)


def memory_findings(device: DeviceInfo, profile: Profile) -> Iterator[Finding]:
    total, free = device.memory_total_bytes, device.memory_available_bytes
    if total is None or free is None:
        yield Finding("note", "Memory", "free memory is not known")
        return
    share = float(profile.settings.get("gpu_memory_utilization", DEFAULT_UTILIZATION))
    cached = profile.settings.get("kv_cache_memory_gb") is not None
    where = "shared memory" if device.integrated else "memory"
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB {where} free"
    # vLLM compares free memory with this share before it loads anything; its CPU backend does not
    # when the cache is given in bytes.
    if free < total * share and not (device.kind == "cpu" and cached):
        lower = free / total
        yield Finding(
            "problem",
            "Memory",
            f"{detail}; vLLM refuses to start below {share:.0%} (gpu_memory_utilization)",
            f"end other programs, or set gpu_memory_utilization below {lower:.2f}",
        )
        return
    sizes = model_shape(_MODEL).bytes_by_precision()
    try:
        choice = choose_precision("auto", device, sizes, profile=profile, utilization=share)
    except ConfigError as exc:
        yield Finding(
            "warn",
            "Memory",
            f"{detail}; {_MODEL} does not fit: {exc}",
            "end other programs, use a quantised checkpoint or a smaller model",
        )
    else:
        yield Finding("ok", "Memory", f"{detail}; {_MODEL} fits as {choice.precision}")


def power_findings(device: DeviceInfo) -> Iterator[Finding]:
    if device.jetson_model is not None:
        mode = device.power_mode
        if mode is None:
            yield Finding("note", "Power mode", "not readable", "check it with: nvpmodel -q")
        elif mode.upper().startswith("MAXN"):
            yield Finding("ok", "Power mode", mode)
        else:
            yield Finding(
                "warn",
                "Power mode",
                f"{mode}, below the board's best",
                "sudo nvpmodel -m 0 (MAXN on AGX boards; others: nvpmodel -p --verbose)",
            )
    limit = device.power_limit_w
    if limit is not None and limit[0] is not None and limit[1] is not None:
        if limit[0] < limit[1]:
            yield Finding(
                "warn",
                "Power limit",
                f"{limit[0]:.0f} W, below the default of {limit[1]:.0f} W",
                f"sudo nvidia-smi -pl {limit[1]:.0f}",
            )
        else:
            yield Finding("ok", "Power limit", f"{limit[0]:.0f} W")
    for name, (now, top) in device.clocks.items():
        if now is None or top is None or device.is_wsl:
            continue
        if now >= top:
            yield Finding("ok", f"Clock, {name}", f"{now} MHz, its maximum")
        else:
            yield Finding("note", f"Clock, {name}", f"{now} of {top} MHz now", _raise(device, name))
    if device.cpu_governor == "powersave" and device.kind == "cpu":
        yield Finding(
            "note",
            "CPU governor",
            "powersave",
            "sudo cpupower frequency-set -g performance",
        )


def cache_findings(src: Sources, found: Sequence[Cache]) -> Iterator[Finding]:
    if src.environ.get("CUDA_CACHE_DISABLE") == "1":
        yield Finding(
            "warn",
            "CUDA_CACHE_DISABLE",
            "is set: code the driver compiles is thrown away at the end",
            "unset it",
        )
    for cache in found:
        what, move = f"Cache, {cache.what}", f"give it a writable folder with {cache.variable}"
        if not cache.writable:
            yield Finding("warn", what, f"{cache.path} cannot be written", move)
        elif not cache.size_bytes:
            yield Finding("note", what, f"{cache.path} is empty: the first start fills it")
        else:
            yield Finding("ok", what, f"{cache.path}, {cache.size_bytes / (1 << 20):.0f} MiB")


def _raise(device: DeviceInfo, clock: str) -> str:
    if device.jetson_model is not None:
        return "idle clocks are low by design; to lock them at their maximum: sudo jetson_clocks"
    if clock == "cpu":
        return "sudo cpupower frequency-set -g performance"
    option = "-lmc" if clock == "memory" else "-lgc"
    top = device.clocks[clock][1]
    return (
        f"idle clocks are low by design; to lock them for a benchmark: sudo nvidia-smi "
        f"{option} {top}"
    )


def _memory(device: DeviceInfo) -> str:
    if device.memory_total_bytes is None:
        return "memory unknown"
    shared = " shared with the CPU" if device.integrated else ""
    return f"{device.memory_total_bytes / GIB:.1f} GiB{shared}"
