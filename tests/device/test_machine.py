"""What a machine tells of its cores, from files as Linux writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hwsearch.device import machine
from hwsearch.device.machine import Machine, cgroup_quota, look


@pytest.mark.parametrize(("text", "cores"), [("200000 100000\n", 2.0), ("50000 100000", 0.5), ("max 100000", None)])
def test_the_quota_of_a_container(tmp_path: Path, text: str, cores: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cgroup_quota(tmp_path) == cores


@pytest.mark.parametrize(("quota", "cores"), [("150000", 1.5), ("-1", None), ("", None), ("nonsense", None)])
def test_the_quota_of_an_old_container(tmp_path: Path, quota: str, cores: float | None) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path) == cores


def test_no_container_has_no_quota(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "turbo"),
    [
        ({"intel_pstate/no_turbo": "0\n"}, "on"),
        ({"intel_pstate/no_turbo": "1"}, "off"),
        ({"cpufreq/boost": "1"}, "on"),
        ({"cpufreq/boost": "0"}, "off"),
        ({}, "unknown"),
    ],
)
def test_turbo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], turbo: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "_CPU", tmp_path)
    assert look().turbo == turbo


def test_affinity_and_quota_limit_what_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    monkeypatch.setattr(machine, "cgroup_quota", lambda: None)
    assert (look().cores, look().usable) == (8, 3.0)
    monkeypatch.setattr(machine, "cgroup_quota", lambda: 1.5)
    assert (look().usable, look().quota) == (1.5, 1.5)
    assert Machine(**look().to_dict()) == look()
