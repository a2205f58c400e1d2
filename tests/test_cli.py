"""The command line as a stranger meets it: every verb on the simulated device, and one clear line for bad input."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import call

RESNET = "hwsearch.models.resnet:resnet_small"
SHAPE = ["--input", "1x1x28x28"]
ON_SIMULATED = ["--device", "simulated"]


def hwsearch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A call in this process: another one would spend most of its time on imports."""
    command = [str(argument) for argument in arguments]
    done = call(*command)
    return subprocess.CompletedProcess(command, done.code, done.out, done.err + done.crash)


def answer(*arguments: str | Path) -> dict[str, Any]:
    """The one JSON object of a verb that works."""
    done = hwsearch(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(*arguments: str | Path, code: int = 2) -> str:
    """The one line that a verb says to bad input."""
    done = hwsearch(*arguments)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("hwsearch: error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose simulated device has been profiled and fitted for a few pretended seconds."""
    import os

    home = tmp_path_factory.mktemp("home")
    shutil.copytree(Path(__file__).resolve().parent.parent / "devices", home / "devices")
    environment = {**os.environ, "HWSEARCH_HOME": str(home)}
    for arguments in (["profile", *ON_SIMULATED, "--minutes", "0.15"], ["fit", *ON_SIMULATED]):
        command = [sys.executable, "-m", "hwsearch", *arguments]
        subprocess.run(command, env=environment, cwd=home, check=True, capture_output=True)
    return home


@pytest.fixture
def at_home(profiled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HWSEARCH_HOME", str(profiled))
    monkeypatch.chdir(profiled)
    return profiled


@pytest.mark.slow
class TestVerbs:
    def test_every_verb_has_help_with_an_example(self) -> None:
        verbs = [
            "profile",
            "fit",
            "estimate",
            "measure",
            "space",
            "search",
            "fold",
            "deploy",
            "verify",
            "report",
            "run",
        ]
        device = ("list", "show", "check", "revalidate", "add")
        for verb in [*([v] for v in verbs), *(["device", v] for v in device)]:
            done = hwsearch(*verb, "--help")
            assert done.returncode == 0
            assert f"hwsearch {' '.join(verb)}" in " ".join(done.stdout.split()), verb

    def test_devices(self, at_home: Path) -> None:
        names = [item["name"] for item in answer("device", "list")["items"]]
        assert "simulated" in names
        checked = answer("device", "check", "simulated")
        assert checked["verdict"] == "ok"
        told = {"canary_spread", "noise_floor", "fingerprint", "threads", "usable_cores", "contention", "turbo"}
        assert told <= set(checked)
        assert answer("device", "show", "simulated")["check"]["verdict"] == "ok"
        added = answer("device", "add", "toy-box", "--runtime", "simulated")
        assert Path(added["path"]).is_file()
        assert answer("device", "show", "toy-box")["runtime"] == "simulated"
        assert "is there already" in refused("device", "add", "toy-box", "--runtime", "simulated")

    def test_estimate_and_measure_agree(self, at_home: Path) -> None:
        estimated = answer("estimate", RESNET, *ON_SIMULATED, *SHAPE)
        measured = answer("measure", RESNET, *ON_SIMULATED, *SHAPE)
        assert estimated["low_ms"] <= estimated["predicted_ms"] <= estimated["high_ms"]
        assert estimated["coverage"] == pytest.approx(1.0)
        assert estimated["p90_ms"] >= estimated["predicted_ms"]
        memory = estimated["memory"]
        parts = memory["peak_activation_bytes"] + memory["input_bytes"] + memory["weight_bytes"]
        assert memory["total_bytes"] == parts
        assert memory["input_bytes"] == 4 * 28 * 28
        assert "peak memory" in hwsearch("estimate", RESNET, *ON_SIMULATED, *SHAPE).stdout
        assert estimated["predicted_ms"] == pytest.approx(measured["measured_ms"], rel=0.25)

    def test_a_space_is_shown_before_any_work(self, at_home: Path) -> None:
        found = answer("space", RESNET, *SHAPE, *ON_SIMULATED, "--quantum", "8", "--freeze", "stages.2.*")
        assert found["unit"] == "ms"
        assert [group["name"] for group in found["groups"]][:2] == ["stem.0", "stages.0.0.conv1"]
        assert not any(group["name"].startswith("stages.2") for group in found["groups"])
        assert "frozen by the user (stages.2.*)" in found["frozen"]
        assert all(0 < group["cost"]["smallest"] <= group["cost"]["full"] for group in found["groups"])
        (at_home / "rules.toml").write_text(
            f'[device]\nname = "simulated"\n[model]\nfactory = "{RESNET}"\ninput = "1x1x28x28"\n'
            '[search]\nbudget = "50%"\n[[groups]]\npattern = "stem.0"\nmaximum = 0.5\n'
        )
        ruled = answer("space", "--config", "rules.toml")
        assert (ruled["groups"][0]["name"], ruled["groups"][0]["units"]) == ("stem.0", 8)
        assert ruled["unit"] == "MMACs"
        line = refused("space", RESNET, *SHAPE, "--freeze", "nowhere.*")
        assert "no group matches 'nowhere.*'" in line
        assert "give a model, or --config" in refused("space")

    def test_an_estimate_explains_itself(self, at_home: Path) -> None:
        plain = answer("estimate", RESNET, *ON_SIMULATED, *SHAPE)
        found = answer("estimate", RESNET, *ON_SIMULATED, *SHAPE, "--explain")
        assert {name: found[name] for name in plain} == plain
        why = found["explanation"]
        assert why["ms"] == pytest.approx(found["predicted_ms"])
        assert sum(layer["ms"] for layer in why["layers"]) + why["overhead_ms"] == pytest.approx(why["ms"])
        assert {layer["bound"] for layer in why["layers"]} <= {"compute", "memory", "overhead"}
        assert 1 <= len(why["reasons"]) <= 2
        assert [stair["width"] for stair in why["stairs"]] == [stair["units"] for stair in why["stairs"]]
        assert any(layer["down"] for layer in why["layers"])
        text = hwsearch("estimate", RESNET, *ON_SIMULATED, *SHAPE, "--explain").stdout
        assert "Why it is not faster:" in text
        assert why["reasons"][0][:60] in " ".join(text.split())
        assert "down to" in text
        answer("fold", RESNET, *SHAPE, "--output", "explained.onnx")
        bare = answer("estimate", "explained.onnx", *ON_SIMULATED, "--explain")["explanation"]
        assert (bare["stairs"], bare["note"]) == ([], "no stair edges: an ONNX file has no width space")
        assert [(x["name"], x["bound"]) for x in bare["layers"]] == [(x["name"], x["bound"]) for x in why["layers"]]

    def test_a_found_network_is_explained_in_its_full_space(self, at_home: Path) -> None:
        import torch

        from hwsearch.graph.model_folder import save_model
        from hwsearch.graph.surgery import shrink
        from hwsearch.graph.widths import WidthSpace
        from hwsearch.models.resnet import resnet_small

        model = resnet_small()
        space = WidthSpace.from_model(model, torch.zeros(1, 1, 28, 28))
        choice = space.uniform(0.55)
        widths = {group.name: width for group, width in zip(space.groups, choice.widths, strict=True)}
        small = shrink(model, space, choice)
        folder = "found-network"
        save_model(folder, small, factory=RESNET, input_shape=(1, 1, 28, 28), widths=widths)
        found = answer("estimate", folder, *ON_SIMULATED, "--explain")
        stairs = found["explanation"]["stairs"]
        assert {stair["group"]: stair["width"] for stair in stairs} == widths
        assert all(stair["units"] > stair["width"] for stair in stairs)
        assert any(stair["up"] for stair in stairs), "unaligned widths can be widened for nothing"
        assert found["explanation"]["ms"] == pytest.approx(found["predicted_ms"])

    def test_a_predictor_is_revalidated(self, at_home: Path) -> None:
        found = answer("device", "revalidate", "simulated")
        assert found["verdict"] == "holds"
        assert found["networks"] == 24
        assert found["messages"]
        plain = hwsearch("device", "revalidate", "simulated", "--accept")
        assert plain.returncode == 0, plain.stderr
        assert "verdict: holds" in plain.stdout
        assert "nothing to accept" in plain.stdout

    def test_a_new_device_from_few_networks(self, at_home: Path) -> None:
        text = (at_home / "devices" / "simulated.toml").read_text()
        (at_home / "devices" / "board.toml").write_text(text.replace("gmacs = 20.0", "gmacs = 7.0"))
        found = answer("fit", "--device", "board", "--from", "simulated", "--networks", "6")
        assert found["networks"] == 6
        assert 0 < found["mape"] < 0.5
        asked = ["hwsearch.models.resnet:resnet_small", *SHAPE]
        slow, fast = (answer("estimate", *asked, "--device", name)["predicted_ms"] for name in ("board", "simulated"))
        assert 1.3 < slow / fast < 20 / 7 * 1.3
        assert "has been profiled already" in refused("fit", "--device", "board", "--from", "simulated")
        (at_home / "devices" / "third.toml").write_text(text)
        assert "predictor" in refused("fit", "--device", "third", "--from", "this-cpu")

    def test_a_runtime_patch_is_refused_until_it_is_revalidated(self, at_home: Path) -> None:
        other = at_home / "patched"
        shutil.copytree(at_home / "devices", other / "devices")
        shutil.copytree(at_home / "latency_tables", other / "latency_tables")
        device = other / "devices" / "simulated.toml"
        device.write_text(device.read_text() + 'version = "1.0.1"\n')
        estimated = ["estimate", RESNET, "--device", str(device), *SHAPE]
        line = refused(*estimated)
        assert "runtime_version '1.0.1' instead of '1'" in line
        assert "device revalidate --accept" in line
        done = hwsearch("device", "revalidate", str(device), "--accept", "--json")
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        assert facts["differences"] == ["runtime_version: 1 against 1.0.1"]
        assert "now also used with 1.0.1" in facts["accepted"]
        assert answer(*estimated)["predicted_ms"] > 0
        device.write_text(device.read_text().replace("gbytes = 10.0", "gbytes = 2.0"))
        broken = hwsearch("device", "revalidate", str(device), "--accept", "--json")
        assert broken.returncode == 1, broken.stderr
        assert json.loads(broken.stdout)["verdict"] == "broken"
        assert "accepted" not in json.loads(broken.stdout)
        assert "cpu 'simulated" in refused(*estimated), "both are named"

    @pytest.mark.parametrize(("name", "theirs"), [("isa", "avx9"), ("precision", "int8"), ("runtime_version", "0.9")])
    def test_a_predictor_of_another_isa_or_precision_is_refused(self, at_home: Path, name: str, theirs: str) -> None:
        path = at_home / "latency_tables" / "simulated" / "predictor" / "manifest.json"
        kept = path.read_text()
        manifest = json.loads(kept)
        mine = manifest["fingerprint"][name]
        manifest["fingerprint"][name] = theirs
        path.write_text(json.dumps(manifest))
        try:
            assert f"{name} {mine!r} instead of {theirs!r}" in refused("estimate", RESNET, *ON_SIMULATED, *SHAPE)
        finally:
            path.write_text(kept)

    def test_an_onnx_file_is_as_good_as_its_factory(self, at_home: Path) -> None:
        folded = answer("fold", RESNET, *SHAPE, "--verify", "--output", "resnet.onnx")
        assert folded["proof"]["ok"] is True
        assert json.loads((at_home / "resnet.fold.json").read_text()) == folded["proof"]
        from_file = answer("estimate", "resnet.onnx", *ON_SIMULATED)
        from_factory = answer("estimate", RESNET, *ON_SIMULATED, *SHAPE)
        assert from_file["predicted_ms"] == from_factory["predicted_ms"]

    def test_deploy_verify_report(self, at_home: Path) -> None:
        measured = answer("measure", RESNET, *ON_SIMULATED, *SHAPE)["measured_ms"]
        for name, budget, code in (("kept", 1.2 * measured, 0), ("missed", 0.5 * measured, 1)):
            told = hwsearch("deploy", RESNET, *ON_SIMULATED, *SHAPE, "--output", name, "--budget-ms", f"{budget:.6f}")
            assert ("it will not pass hwsearch verify" in told.stderr) == (code == 1), told.stderr
            done = hwsearch("verify", name, *ON_SIMULATED, "--json")
            assert done.returncode == code, done.stderr
            assert json.loads(done.stdout)["status"] == ("pass" if code == 0 else "fail")
        assert Path(answer("report", "kept", "--output", "kept.html")["report"]).stat().st_size > 10_000


@pytest.mark.slow
class TestBadInput:
    def test_devices(self, at_home: Path) -> None:
        assert "unknown device 'toaster'" in refused("device", "show", "toaster")
        assert "toaster" in refused("profile", "--device", "toaster")
        Path("broken.toml").write_text("runtime = \n")
        assert "broken.toml" in refused("device", "show", "broken.toml")
        Path("field.toml").write_text('runtime = "simulated"\nthreads = "two"\n')
        assert "threads" in refused("device", "show", "field.toml")

    @pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
    def test_minutes(self, at_home: Path, minutes: str) -> None:
        assert "minutes" in refused("profile", *ON_SIMULATED, "--minutes", minutes)

    def test_models(self, at_home: Path) -> None:
        assert "cannot read the model" in refused("estimate", "missing.onnx", *ON_SIMULATED)
        Path("broken.onnx").write_bytes(b"\x00\x01 not a model")
        assert "broken.onnx is not a usable ONNX file" in refused("measure", "broken.onnx", *ON_SIMULATED)
        assert "there is no model 'nothing'" in refused("estimate", "nothing", *ON_SIMULATED)
        assert "no Python module" in refused("estimate", "no.such.module:net", *ON_SIMULATED, *SHAPE)
        assert "has no 'nothing'" in refused("estimate", "hwsearch.models.vgg:nothing", *ON_SIMULATED, *SHAPE)
        assert "needs the shape of its input" in refused("estimate", RESNET, *ON_SIMULATED)
        assert "holds no model.json" in refused("estimate", ".", *ON_SIMULATED)

    @pytest.mark.parametrize("shape", ["", "1x", "0x1x28x28", "axb", "1x1x28x-3", "1x1x28x1e9"])
    def test_shapes_that_are_none(self, at_home: Path, shape: str) -> None:
        assert "the input shape is" in refused("estimate", RESNET, *ON_SIMULATED, f"--input={shape or ' '}")

    def test_a_shape_that_does_not_fit(self, at_home: Path) -> None:
        line = refused("estimate", RESNET, *ON_SIMULATED, "--input", "1x3x28x28")
        assert "1, 3, 28, 28" in line or "1x3x28x28" in line

    def test_a_model_whose_forward_fails(self, at_home: Path) -> None:
        Path("faulty.py").write_text(
            "import torch\n\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
            "        raise ValueError('wires crossed')\n"
        )
        assert "wires crossed" in refused("measure", "faulty:Net", *ON_SIMULATED, *SHAPE)

    def test_a_device_that_was_never_fitted(self, home: Path) -> None:
        assert "hwsearch profile" in refused("estimate", RESNET, *ON_SIMULATED, *SHAPE)
        assert "simulated" in refused("fit", *ON_SIMULATED)

    @pytest.mark.parametrize("budget", ["0", "-3", "nan", "inf"])
    def test_budgets_of_a_bundle(self, at_home: Path, budget: str) -> None:
        line = refused("deploy", RESNET, *ON_SIMULATED, *SHAPE, "--output", "never", f"--budget-ms={budget}")
        assert "budget" in line
        assert not Path("never").exists()

    def test_bundles_and_reports(self, at_home: Path) -> None:
        assert "nowhere" in refused("verify", "nowhere", *ON_SIMULATED)
        assert "nowhere" in refused("report", "nowhere")
        Path("full").mkdir()
        Path("full/precious.txt").write_text("keep me")
        refused("deploy", RESNET, *ON_SIMULATED, *SHAPE, "--output", "full")
        assert Path("full/precious.txt").read_text() == "keep me"

    def test_places_that_cannot_be_written(self, at_home: Path) -> None:
        Path("file").write_text("not a folder")
        deployed = ["deploy", RESNET, *ON_SIMULATED, *SHAPE, "--output"]
        assert "cannot write" in refused(*deployed, "file/bundle")
        assert "cannot write" in refused("fold", RESNET, *SHAPE, "--output", "file/net.onnx")
        Path("readonly.toml").write_text('[run]\nfolder = "file/runs"\n' + CONFIG.format(search='budget = "50%"'))
        assert "cannot write the run folder" in refused("run", "readonly.toml")

    def test_an_unknown_option_is_not_a_traceback(self) -> None:
        done = hwsearch("profile", "--nonsense")
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


@pytest.mark.slow
class TestBadTables:
    """Over the command line, each damage of a table is one line with the file and the line of it."""

    @pytest.fixture
    def table(self, profiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        shutil.copytree(profiled / "devices", tmp_path / "devices")
        shutil.copytree(profiled / "latency_tables", tmp_path / "latency_tables")
        monkeypatch.setenv("HWSEARCH_HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        return tmp_path / "latency_tables" / "simulated"

    @staticmethod
    def rewrite(path: Path, line: int, column: str, value: str) -> None:
        """One cell of a CSV file; its line counts from 1, the header's."""
        lines = path.read_text().splitlines()
        cells = next(csv.reader([lines[line - 1]]))
        cells[next(csv.reader([lines[0]])).index(column)] = value
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(cells)
        lines[line - 1] = text.getvalue()
        path.write_text("\n".join(lines) + "\n")

    @pytest.mark.parametrize("value", ["nan", "0", "0.0", "-0.5", "inf", "", "fast"])
    @pytest.mark.parametrize(("name", "column"), [("networks.csv", "measured_ms"), ("kernels.csv", "ms")])
    def test_latencies_that_are_none(self, table: Path, name: str, column: str, value: str) -> None:
        self.rewrite(table / name, 4, column, value)
        line = refused("fit", *ON_SIMULATED)
        assert f"{table / name}, line 4: {column} is {value!r}, not a positive number" in line

    def test_a_network_twice(self, table: Path) -> None:
        path = table / "networks.csv"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:6], lines[4], *lines[6:]]) + "\n")
        line = refused("fit", *ON_SIMULATED)
        assert f"{path}, line 7: network" in line
        assert "is there twice" in line

    def test_a_kernel_twice(self, table: Path) -> None:
        path = table / "kernels.csv"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:3], lines[2], *lines[3:]]) + "\n")
        assert f"{path}, line 4: kernel 1 of network" in refused("fit", *ON_SIMULATED)

    def test_a_truncated_table(self, table: Path) -> None:
        path = table / "kernels.csv"
        whole = path.read_text()
        lines = whole.splitlines()
        path.write_text("\n".join(lines[:-3]) + "\n")
        assert f"{path}, line {len(lines) - 3}: ends after {len(lines) - 4} of {len(lines) - 1} rows" in refused(
            "fit", *ON_SIMULATED
        )
        path.write_text(whole[:-20])
        assert f"{path}, line {len(lines)}: " in refused("fit", *ON_SIMULATED)

    def test_a_table_changed_by_hand(self, table: Path) -> None:
        self.rewrite(table / "networks.csv", 3, "measured_ms", "1.25")
        assert "changed since it was written (SHA-256 differs)" in refused("fit", *ON_SIMULATED)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"schema": "hwsearch.other"}, "schema is 'hwsearch.other', expected 'hwsearch.latency-table'"),
            ({"version": 99}, "table version 99, this release reads"),
            ({"reference_ms": "quick"}, "missing or wrong"),
            ({"seeds": "none"}, "missing or wrong"),
        ],
    )
    def test_a_table_of_another_schema(self, table: Path, change: dict[str, Any], words: str) -> None:
        path = table / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        line = refused("fit", *ON_SIMULATED)
        assert str(path) in line
        assert words in line

    def test_a_manifest_cut_short(self, table: Path) -> None:
        path = table / "manifest.json"
        path.write_text(path.read_text()[:100])
        assert f"{path}, line " in refused("fit", *ON_SIMULATED)

    def test_a_journal_of_an_older_release(self, table: Path) -> None:
        path = table / "journal.sqlite"
        path.unlink()
        base = sqlite3.connect(path)
        base.executescript("CREATE TABLE networks (id TEXT, document TEXT)")
        base.close()
        line = refused("profile", *ON_SIMULATED, "--minutes", "0.1")
        assert f"{path} was written by another release of hwsearch" in line


CONFIG = """
[device]
name = "simulated"
[model]
factory = "hwsearch.models.vgg:vgg_small"
input = "1x1x16x16"
[search]
{search}
"""


@pytest.mark.slow
class TestBadConfigs:
    @pytest.mark.parametrize(
        ("search", "says"),
        [
            ("budget_ms = 0", "search.budget_ms"),
            ("budget_ms = nan", "search.budget_ms"),
            ('budget_ms = "fast"', "search.budget_ms"),
            ('budget = "lots"', "search.budget"),
            ('budget = "50%"\nbudgt = 3', "did you mean"),
            ("", "budget"),
        ],
    )
    def test_fields(self, at_home: Path, search: str, says: str) -> None:
        Path("bad.toml").write_text(CONFIG.format(search=search))
        assert says in refused("run", "bad.toml")

    def test_files(self, at_home: Path) -> None:
        assert "missing.toml" in refused("run", "missing.toml")
        Path("torn.toml").write_text("[run\n")
        assert "torn.toml is not valid TOML" in refused("run", "torn.toml")

    def test_a_budget_out_of_reach_is_refused_before_any_training(self, at_home: Path) -> None:
        text = CONFIG.format(search="budget_ms = 0.001\nminimum = 0.5\nquantum = 8")
        Path("tiny.toml").write_text('[run]\nname = "tiny"\n[profile]\nminutes = 0.1\n' + text)
        line = refused("run", "tiny.toml", code=1)
        assert "smallest reachable is" in line
        assert not (at_home / "runs" / "tiny" / "state" / "supernet").exists()


@pytest.mark.slow
def test_a_folder_that_names_foreign_code_is_run_only_by_name(at_home: Path) -> None:
    from hwsearch.graph.model_folder import save_model
    from hwsearch.models.resnet import resnet_small

    Path("mine.py").write_text(
        "from hwsearch.models.resnet import resnet_small\n\n\ndef net():\n    return resnet_small()\n"
    )
    save_model("saved", resnet_small(), factory="mine:net", input_shape=(1, 1, 28, 28))
    assert "--allow-factory mine:net" in refused("measure", "saved", *ON_SIMULATED)
    assert answer("measure", "saved", *ON_SIMULATED, "--allow-factory", "mine:net")["measured_ms"] > 0
