"""A session against the simulated device: the same agent, files and joins as with a real one, faults included."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hwsearch.device import session as session_module
from hwsearch.device.check import check_device
from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.device.stopwatch import PROFILE
from hwsearch.errors import DeviceJobError, HwsearchError, InputError, InternalError, NoisyDeviceError

sys.path.insert(0, str(Path(__file__).parent))

from device_graphs import Graph, residual, separable

REPOSITORY = Path(__file__).resolve().parent.parent.parent
REFERENCE_MS = 0.27
NETWORKS = [("residual", residual()), ("separable", separable()), ("odd", separable(30)), ("small", residual(8))]


def device(**options: float | str) -> Device:
    return Device("simulated", "simulated", options=options)


@pytest.fixture(scope="module")
def session() -> Iterator[DeviceSession]:
    with open_session(device()) as opened:
        yield opened


def collect(
    opened: DeviceSession, networks: list[tuple[str, bytes]], **settings: object
) -> tuple[dict, dict[str, str]]:
    """Timings and errors by name."""
    errors: dict[str, str] = {}

    def note(name: str, error: HwsearchError) -> None:
        errors[name] = f"{type(error).__name__}: {error}"

    timings = opened.time(networks, reference_ms=REFERENCE_MS, on_error=note, **settings)  # type: ignore[arg-type]
    return {timing.network: timing for timing in timings}, errors


def test_the_fingerprint_is_the_devices_own(session: DeviceSession) -> None:
    assert session.fingerprint.runtime == "simulated"
    assert session.fingerprint is session.fingerprint


def test_lowering_gives_the_kernels_of_each_network_in_order(session: DeviceSession) -> None:
    lowered = session.lower([network for _, network in NETWORKS])
    assert [len(kernels) for kernels in lowered] == [len(session.lower([network])[0]) for _, network in NETWORKS]
    assert session.lower([]) == []


def test_timings_come_with_their_nodes(session: DeviceSession) -> None:
    timings, errors = collect(session, NETWORKS, nodes=True)
    assert not errors
    assert set(timings) == {name for name, _ in NETWORKS}
    for name, network in NETWORKS:
        timing = timings[name]
        assert timing.kernels == session.lower([network])[0]
        assert [node for node, _ in timing.node_shares] == [kernel.node for kernel in timing.kernels]
        assert sum(share for _, share in timing.node_shares) == pytest.approx(1.0)
        assert timing.seconds > 0
    plain, _ = collect(session, NETWORKS[:1])
    assert plain["residual"].kernels == ()
    assert plain["residual"].measured_ms == timings["residual"].measured_ms


def test_results_do_not_depend_on_company_order_or_restart(session: DeviceSession) -> None:
    together, _ = collect(session, NETWORKS, nodes=True)
    backwards, _ = collect(session, NETWORKS[::-1], nodes=True)
    session.restart()
    alone = {name: collect(session, [(name, network)], nodes=True)[0][name] for name, network in NETWORKS}
    assert together == backwards == alone


def test_running_gives_the_networks_outputs(session: DeviceSession) -> None:
    graph = Graph(1, 2, 2, 2)
    graph.node("Relu", "input", "file")  # a name that np.savez keeps for itself
    values = np.array([[[[-1, 2], [3, -4]], [[5, -6], [-7, 8]]]], np.float32)
    outputs = session.run(graph.bytes(), {"input": values})
    np.testing.assert_array_equal(outputs["file"], np.maximum(values, 0))
    with pytest.raises(DeviceJobError, match="nput"):
        session.run(graph.bytes(), {"wrong": values})
    with pytest.raises(DeviceJobError):
        session.run(graph.bytes(), {"input": values[:, :1]})


def test_a_broken_network_costs_itself_and_is_named_in_one_line(session: DeviceSession) -> None:
    timings, errors = collect(session, [NETWORKS[0], ("broken", b"no onnx"), NETWORKS[1]])
    assert set(timings) == {"residual", "separable"}
    assert errors["broken"].startswith("DeviceJobError: network 'broken': no ONNX file: ")
    assert "\n" not in errors["broken"]
    with pytest.raises(DeviceJobError, match="network '2 of 2': no ONNX file"):
        session.lower([residual(), b"no onnx"])
    with pytest.raises(DeviceJobError, match="network 'mine'"):
        session.optimise([b"no onnx"], names=["mine"])


def test_without_a_handler_the_error_is_raised_and_the_session_goes_on(session: DeviceSession) -> None:
    with pytest.raises(DeviceJobError, match="broken"):
        list(session.time([("broken", b"no onnx"), *NETWORKS], reference_ms=REFERENCE_MS))
    assert len(collect(session, NETWORKS)[0]) == len(NETWORKS)


def test_an_abandoned_iterator_does_not_block_the_session(session: DeviceSession) -> None:
    iterator = session.time(NETWORKS, reference_ms=REFERENCE_MS)
    next(iterator)
    with pytest.raises(InternalError, match="still open"):
        session.lower([residual()])
    iterator.close()  # type: ignore[attr-defined]
    assert len(session.lower([residual()])) == 1


def test_a_crash_costs_one_network(session: DeviceSession) -> None:
    networks = [NETWORKS[0], ("bad one", residual()), NETWORKS[1], ("bad two", residual()), NETWORKS[2]]
    with open_session(device(crash_on="bad")) as faulty:
        timings, errors = collect(faulty, networks, nodes=True)
    assert set(timings) == {"residual", "separable", "odd"}
    assert errors == {
        name: f"DeviceJobError: network '{name}': the agent was killed by SIGKILL" for name in ("bad one", "bad two")
    }


def test_a_silent_agent_is_stopped_and_costs_one_network() -> None:
    with open_session(device(hang_on="bad"), timeout_s=2.0) as faulty:
        timings, errors = collect(faulty, [NETWORKS[0], ("bad", residual()), NETWORKS[1]])
    assert set(timings) == {"residual", "separable"}
    assert errors == {"bad": "DeviceJobError: network 'bad': the agent said nothing for 2 s and was stopped"}


def test_a_refused_network_is_told() -> None:
    with open_session(device(fail_on="bad")) as faulty:
        timings, errors = collect(faulty, [("bad", residual()), NETWORKS[0]])
    assert set(timings) == {"residual"}
    assert "network 'bad': this simulated device refuses" in errors["bad"]


def test_a_killed_agent_is_started_again() -> None:
    with open_session(device()) as opened:
        before = opened.lower([residual()])
        first = opened.agent_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert opened.lower([residual()]) == before
        assert opened.agent_pid != first


def test_an_agent_killed_between_two_results_costs_at_most_one() -> None:
    with open_session(device()) as opened:
        errors: list[str] = []
        iterator = opened.time(
            NETWORKS * 20, reference_ms=REFERENCE_MS, on_error=lambda name, error: errors.append(str(error))
        )
        first = next(iterator)
        assert opened.agent_pid is not None
        os.kill(opened.agent_pid, signal.SIGKILL)
        assert 1 + len(list(iterator)) + len(errors) == 4 * 20
        assert len(errors) <= 1
        assert first.network in dict(NETWORKS)


def test_a_device_that_does_not_work_at_all_is_one_error() -> None:
    with open_session(device(gmacs=-1)) as opened:
        with pytest.raises(InputError, match=r"options\.gmacs"):
            opened.lower([residual()])
        with pytest.raises(InputError, match=r"options\.gmacs"):
            list(opened.time(NETWORKS, reference_ms=REFERENCE_MS, on_error=lambda name, error: None))


def test_an_agent_that_never_starts_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_session(device()) as opened:
        monkeypatch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(
            DeviceJobError, match="device simulated: job time: the agent ended with status 1, at no network"
        ):
            list(opened.time(NETWORKS, reference_ms=REFERENCE_MS, on_error=lambda name, error: None))
        with pytest.raises(DeviceJobError, match="device simulated: job probe: the agent ended with status 1"):
            _ = opened.fingerprint


def test_a_noisy_device_is_told_for_each_network() -> None:
    with open_session(device(slowdown=2.0)) as busy:
        timings, errors = collect(busy, NETWORKS[:2])
    assert not timings
    assert all(error.startswith(NoisyDeviceError.__name__) for error in errors.values())
    assert len(errors) == 2


def test_a_senseless_reference_is_the_users_mistake(session: DeviceSession) -> None:
    with pytest.raises(InputError, match="reference_ms"):
        list(session.time(NETWORKS, reference_ms=-1.0, settings=PROFILE))


def test_large_batches_are_cut_into_jobs(session: DeviceSession, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = collect(session, NETWORKS)
    monkeypatch.setattr(session_module, "_JOB_BYTES", 1)
    assert collect(session, NETWORKS)[0] == whole
    monkeypatch.setattr(session_module, "_JOB_NETWORKS", 3)
    assert [len(kernels) for kernels in session.lower([residual()] * 7)] == [7] * 7


def test_the_canary_is_calibrated_and_repeats(session: DeviceSession) -> None:
    reference = session.calibrate_canary(1.0)
    assert reference == session.calibrate_canary(1.0)
    assert reference.fast_ms <= reference.median_ms
    assert session.calibrate(0.1)[1:] == (None, None)  # nobody else is on a simulated machine


def test_a_name_opens_a_device_and_an_unknown_one_does_not() -> None:
    with open_session("simulated") as opened:
        assert opened.device.name == "simulated"
    with pytest.raises(InputError, match="unknown device"):
        open_session("tpu")


def test_files_are_removed_also_those_of_a_killed_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "scratch", lambda: str(tmp_path))
    dead = Path(tempfile.mkdtemp(dir=tmp_path, prefix="hwsearch-session-"))
    (dead / "model.onnx").write_bytes(b"x")
    os.utime(dead, (0, 0))
    alive = open_session(device())
    os.utime(alive._folder, (0, 0))
    assert not dead.exists()
    with open_session(device()) as opened:
        assert alive._folder.exists()  # old, but somebody holds its lock
        opened.lower([residual()])
        assert len(list(opened._folder.iterdir())) == 2  # the canary and the lock: a job's files are gone
    alive.close()
    alive.close()  # once more does no harm
    assert list(tmp_path.iterdir()) == []


def test_an_agent_ends_with_its_host_however_that_ends() -> None:
    code = (
        "import time\nfrom hwsearch.device.session import open_session\ns = open_session('simulated')\n"
        "s.fingerprint\nprint(s.agent_pid, flush=True)\ntime.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    host = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert host.stdout is not None
    agent = int(host.stdout.readline())
    host.kill()
    host.wait()
    for _ in range(500):
        if not Path(f"/proc/{agent}").exists() or "Z" in Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2][:3]:
            return
        time.sleep(0.02)
    pytest.fail("the agent outlives its host")


def test_the_simulated_device_never_takes_the_timing_lock(
    session: DeviceSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the lock was taken")

    monkeypatch.setattr(session_module, "timing_lock", refuse)
    assert collect(session, NETWORKS[:1])[0]
    session.calibrate_canary(0.1)
    check_device(device(), seconds=0.5, passes=2, save=False, session=session)
