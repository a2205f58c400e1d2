"""The agent's side of the conversation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hwsearch.device.spec import Device

REPOSITORY = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}
DEVICE = Device("simulated", "simulated").to_dict()


def talk(*requests: dict[str, Any], cwd: Path | None = None) -> list[dict[str, Any]]:
    """Sends the requests, reads until each is answered, and lets the agent go."""
    command = [sys.executable, "-P", "-m", "hwsearch.device.agent"]
    agent = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=cwd,
    )
    assert agent.stdin is not None
    assert agent.stdout is not None
    assert json.loads(agent.stdout.readline())["event"] == "ready"
    answers: list[dict[str, Any]] = []
    for number, request in enumerate(requests):
        agent.stdin.write(json.dumps({"id": number, "device": DEVICE} | request) + "\n")
        agent.stdin.flush()
        while not answers or answers[-1]["id"] != number or answers[-1]["event"] not in ("done", "error"):
            answers.append(json.loads(agent.stdout.readline()))
    agent.stdin.close()
    assert agent.wait(timeout=20) == 0
    return answers


def test_every_answer_carries_the_requests_number() -> None:
    first, second = talk({"job": "probe"}, {"job": "probe"})
    assert (first["id"], second["id"]) == (0, 1)
    assert first["fingerprint"] == second["fingerprint"]


def test_an_unknown_job_is_an_error_and_no_method_is_reachable_by_name() -> None:
    unknown, private, alive = talk({"job": "dance"}, {"job": "_bench"}, {"job": "probe"})
    assert (unknown["event"], unknown["kind"]) == ("error", "DeviceJobError")
    assert private["event"] == "error"
    assert alive["event"] == "done"


def test_a_bug_is_told_as_one_and_the_agent_lives() -> None:
    bug, alive = talk({"job": "optimise"}, {"job": "probe"})
    assert (bug["event"], bug["kind"]) == ("error", "InternalError")
    assert alive["event"] == "done"


def test_modules_in_the_current_folder_are_not_taken_for_pythons(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('stolen')", encoding="utf-8")
    assert talk({"job": "probe"}, cwd=tmp_path)[0]["event"] == "done"


def test_the_device_side_needs_numpy_and_its_runtime_only() -> None:
    code = (
        "import sys, hwsearch.device.agent, hwsearch.device.runtime_onnxruntime, hwsearch.device.runtime_simulated\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'pydantic', 'rich', 'typer', 'xgboost', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert result.stdout.strip() == "[]"
