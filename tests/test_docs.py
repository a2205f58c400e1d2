"""The documentation as tests: every command in it runs, every link in it leads somewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
# The documents show what a user types; here the same lines run with less work: a campaign of seconds, on the simulated
# device. The quickstart has a test of its own, as --quick; tools/test is what runs this file.
EXEMPT = ("./tools/", "tools/", "git ", ".venv/bin/python -m pytest", "source ")
CHEAPER = (
    (r"--minutes [\d.]+", "--minutes 0.1"),
    (r"\bx86-ort-[12]t\b", "simulated"),
    # a device that a document adds, also a board, is a simulated one here; tests/test_board_verbs.py has a real board
    (r" --host \S+( --python \S+)?", ""),
    (r"\bdevice add (\S+)(?!.*--runtime)", r"device add \1 --runtime simulated"),
)


def commands(path: Path) -> list[str]:
    """The lines of every fenced block marked ``bash`` or ``console``, continuation lines joined, comments dropped."""
    lines: list[str] = []
    for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", path.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            text = re.sub(r"\s+#.*$", "", line.strip().removeprefix("$ "))
            if text and not text.startswith("#"):
                lines.append(text)
    return lines


def with_commands() -> list[object]:
    """The documents that have commands."""
    found = [path for path in DOCUMENTS if any(not c.startswith(EXEMPT) for c in commands(path))]
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in found]


@pytest.mark.long
@pytest.mark.parametrize("path", with_commands())
def test_every_command_runs(path: Path, home: Path) -> None:
    """In order, in one fresh home, as a reader would; exit status 1 (the answer is no) is a result, 2 is not."""
    (home / "examples").symlink_to(ROOT / "examples")
    for command in commands(path):
        if command.startswith(EXEMPT):
            continue
        cheap = command
        for pattern, replacement in CHEAPER:
            cheap = re.sub(pattern, replacement, cheap)
        words = shlex.split(cheap)
        assert words[0] == "hwsearch", f"{path.name}: only hwsearch commands can be checked here: {command}"
        done = subprocess.run(
            [sys.executable, "-m", "hwsearch", *words[1:]], capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode in (0, 1), f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.long
@pytest.mark.real
@pytest.mark.serial
def test_the_quickstart_runs(home: Path) -> None:
    """As ``--quick``, the whole path on this CPU; a busy machine may end it with exit status 1, but not earlier."""
    done = subprocess.run(
        [ROOT / "tools" / "quickstart", "--quick", "--json"], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 1), done.stderr
    if not done.stdout:  # refused before the end: only a device that cannot be measured now may do that
        assert "this-cpu" in done.stderr.splitlines()[-1], done.stderr
        pytest.skip(done.stderr.splitlines()[-1])
    outcome = json.loads(done.stdout)
    assert [row["name"] for row in outcome["rows"]] == ["full", "uniform", "found"]
    full, _, found = outcome["rows"]
    assert found["measured_ms"] < 0.75 * full["measured_ms"]
    assert outcome["verdict"]["status"] in ("pass", "conditional", "fail")
    assert (home / outcome["report"]).is_file()


@pytest.mark.long
def test_the_python_of_the_readme_runs(home: Path) -> None:
    """As written, on a small network, the simulated device and a short campaign."""
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    cheaper = ((r"minutes=[\d.]+", "minutes=0.2"), (r"max_ms=[\d.]+", "max_ms=budget_ms"), CHEAPER[1])
    for pattern, replacement in cheaper:
        block = re.sub(pattern, replacement, block)
    before = """
import torch
import hwsearch.search.cafenet as cafenet
from hwsearch.models.vgg import vgg_small
from hwsearch.search.scoring import ScoringConfig
from hwsearch.train.data import split, synthetic_images
from hwsearch.train.loop import TrainConfig

torch.set_num_threads(1)
model, example_input, budget_ms = vgg_small(width=0.5), torch.zeros(1, 1, 28, 28), 0.35
train, valid = split(synthetic_images(400, seed=1), 100, seed=0)
few = TrainConfig(steps=5)
# The example uses the defaults; the test cannot afford them.
small = cafenet.CafeNetConfig(training=few, winner=few, scoring=ScoringConfig(images=50, calibration_images=50))
cafenet.CafeNetConfig = lambda: small
"""
    after = "assert verdict.status in ('pass', 'conditional', 'fail'), verdict\nprint(verdict.status)\n"
    done = subprocess.run(
        [sys.executable, "-c", before + block + after], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "pass"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path.name} links to {target}"
        if anchor and linked.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{path.name} links to {target}; {linked.name} has {sorted(anchors)}"
