"""The machine: its processor by name and instruction sets, and what decides how steadily it can be timed.

Runs where the device is: standard library only. Whatever the system does not tell is None or "unknown".
"""

from __future__ import annotations

import math
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_CPU = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")

#: Instruction sets that a CPU runtime chooses its kernels by.
_ISA_FLAGS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8",
    "neon", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Machine:
    """What the agent found.

    Attributes:
        cores: of the machine.
        usable: cores that this process may use: its affinity, and a container's quota where that is less.
        quota: cores that the container's quota allows, or None.
        turbo: ``"on"``, ``"off"`` or ``"unknown"``: whether the clock rises above its nominal frequency.
        smt: whether two hardware threads share a core, or None.
    """

    cores: int
    usable: float
    quota: float | None = None
    turbo: str = "unknown"
    smt: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def look() -> Machine:
    """The machine as this process sees it."""
    cores = os.cpu_count() or 1
    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on every system
        allowed = cores
    quota = cgroup_quota()
    usable = float(allowed) if quota is None else min(float(allowed), quota)
    return Machine(cores, usable, quota, _turbo(), _smt())


def cgroup_quota(root: Path = _CGROUPS) -> float | None:
    """Cores that a container may use, by either version of Linux' control groups; None where there is no limit."""
    words = _text(root / "cpu.max").split()  # "200000 100000" or "max 100000"
    if not words:
        words = [_text(root / "cpu" / "cpu.cfs_quota_us"), _text(root / "cpu" / "cpu.cfs_period_us")]
    try:
        quota, period = float(words[0]), float(words[1])
    except (ValueError, IndexError):
        return None
    return quota / period if quota > 0 and period > 0 and math.isfinite(quota) else None


def _turbo() -> str:
    no_turbo, boost = _text(_CPU / "intel_pstate" / "no_turbo"), _text(_CPU / "cpufreq" / "boost")
    if no_turbo in ("0", "1"):
        return "on" if no_turbo == "0" else "off"
    return {"0": "off", "1": "on"}.get(boost, "unknown")


def _smt() -> bool | None:
    return {"0": False, "1": True}.get(_text(_CPU / "smt" / "active"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def processor() -> tuple[str, frozenset[str]]:
    """The CPU's name and its feature flags."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    found = dict(re.findall(r"^(model name|Hardware|CPU part|flags|Features)\s*:\s*(.*)$", text, re.MULTILINE))
    name = (
        found.get("model name") or found.get("Hardware") or f"{platform.machine()} {found.get('CPU part', '')}".strip()
    )
    return name, frozenset((found.get("flags") or found.get("Features") or "").split())


def instruction_sets(flags: frozenset[str]) -> str:
    """Those of a CPU's flags that kernels are chosen by, as one text; the architecture where none of them is known.

    Example:
        >>> instruction_sets(frozenset({"avx2", "fpu", "avx"}))
        'avx avx2'
    """
    return " ".join(flag for flag in _ISA_FLAGS if flag in flags) or platform.machine()


def governor() -> str:
    """The frequency governors of all cores, or "unknown" (virtual machines show none)."""
    found = {_text(path) for path in _CPU.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {""}
    return "+".join(sorted(found)) or "unknown"
