"""A bundle says what is in it and is believed only as far as every byte agrees."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hwsearch.deploy.bundle import deploy, read_bundle
from hwsearch.device.spec import Device
from hwsearch.errors import CheckFailedError, HwsearchError, InputError, SchemaError, UnsupportedModelError

torch.set_num_threads(1)
DEVICE = Device(name="toy", runtime="simulated")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "bundle"
    deploy(network(), torch.randn(1, 1, 8, 8), DEVICE, folder, budget_ms=1.5, predicted_ms=1.4, name="found")
    return folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "bundle")
    return tmp_path / "bundle"


def rewrite(bundle: Path, change: Callable[[dict], object]) -> None:
    """Edit the manifest."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Change a file and make the manifest agree."""
    (bundle / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    rewrite(bundle, lambda m: m["files"].update({name: entry}))


def test_it_reads_back_what_was_deployed(bundle: Path) -> None:
    read = read_bundle(bundle)
    assert (read.name, read.device, read.budget_ms, read.predicted_ms, read.measured_ms) == (
        "found", "toy", 1.5, 1.4, None,
    )  # fmt: skip
    assert read.input_shape == (1, 1, 8, 8)
    assert len(read.cases) == 3
    assert read.parameters == 8 * 9 + 8 + 8 * 5 + 5  # folded: the convolution has a bias, the batch norm is gone
    assert read.macs == 8 * 9 * 64 + 8 * 5
    model = network()
    for case in read.cases:
        with torch.no_grad():
            expected = model(torch.from_numpy(case.input.copy()))
        assert np.array_equal(case.output, expected.numpy())


def test_deploying_again_gives_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    example = torch.randn(1, 1, 8, 8)
    first = deploy(network(), example, DEVICE, tmp_path / "a", budget_ms=1.5)
    second = deploy(network(), example, DEVICE, tmp_path / "b", budget_ms=1.5)
    assert first.sha256 == second.sha256
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_a_bundle_replaces_an_older_one_and_leaves_no_rubbish(bundle: Path) -> None:
    deploy(network(), torch.randn(1, 1, 8, 8), DEVICE, bundle, budget_ms=9.0, cases=1)
    assert read_bundle(bundle).budget_ms == 9.0
    names = ["canary.onnx", "fold.json", "input_0.npy", "manifest.json", "model.onnx", "output_0.npy"]
    assert sorted(p.name for p in bundle.iterdir()) == names
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_a_bundle_carries_the_proof_of_its_fold(bundle: Path, tmp_path: Path) -> None:
    proof = json.loads((bundle / "fold.json").read_text())
    assert proof["ok"] is True
    assert proof["pairs"]
    assert {case["statistics"] for case in proof["cases"]} == {"as given", "random"}
    assert max(case["max_relative_error"] for case in proof["cases"]) == proof["max_relative_error"] < 1e-4
    assert json.loads((bundle / "manifest.json").read_text())["files"]["fold.json"]["sha256"]
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    deploy(plain, torch.randn(1, 1, 8, 8), DEVICE, tmp_path / "plain")
    assert not (tmp_path / "plain/fold.json").exists(), "there is nothing to prove"


def test_other_files_in_the_folder_are_left_alone(bundle: Path) -> None:
    (bundle / "verdict.json").write_text("anything")
    assert read_bundle(bundle).name == "found"


# --- refusals of the reader: one line, naming the file ---


def corrupt(name: str) -> Callable[[Path], object]:
    def change(bundle: Path) -> None:
        content = bytearray((bundle / name).read_bytes())
        content[len(content) // 2] ^= 1
        (bundle / name).write_bytes(bytes(content))

    return change


def listed(name: str) -> Callable[[Path], object]:
    return lambda b: rewrite(b, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))


def field(**values: object) -> Callable[[Path], object]:
    return lambda b: rewrite(b, lambda m: m.update(values))


def manifest_text(text: str) -> Callable[[Path], object]:
    return lambda b: (b / "manifest.json").write_text(text)


def link(name: str) -> Callable[[Path], object]:
    def change(bundle: Path) -> None:
        shutil.copy(bundle / name, bundle.parent / "elsewhere")
        (bundle / name).unlink()
        (bundle / name).symlink_to(bundle.parent / "elsewhere")

    return change


def pickled(bundle: Path) -> None:
    with (bundle / "x").open("wb") as file:
        np.save(file, np.array([{"code": 1}], dtype=object), allow_pickle=True)
    replace_file(bundle, "input_0.npy", (bundle / "x").read_bytes())


def huge_header(bundle: Path) -> None:
    content = (bundle / "input_0.npy").read_bytes().replace(b"(1, 1, 8, 8)", b"(999999999,)")
    replace_file(bundle, "input_0.npy", content)


def outside_weights(bundle: Path) -> None:
    import onnx

    model = onnx.load(str(bundle / "model.onnx"))
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, "../../secret")
    tensor.ClearField("raw_data")
    replace_file(bundle, "model.onnx", model.SerializeToString())


def fifo(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    os.mkfifo(bundle / "model.onnx")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit of the model": (corrupt("model.onnx"), r"model\.onnx does not have the SHA-256"),
    "one bit of an input": (corrupt("input_1.npy"), r"input_1\.npy does not have the SHA-256"),
    "a missing file": (lambda b: (b / "output_2.npy").unlink(), r"output_2\.npy cannot be read \(No such file"),
    "a truncated file": (lambda b: os.truncate(b / "model.onnx", 100), r"model\.onnx has 100 bytes, the manifest says"),
    "a longer file": (lambda b: (b / "model.onnx").write_bytes(b"x" * 99999), "at most .* are expected"),
    "a folder as file": (lambda b: ((b / "model.onnx").unlink(), (b / "model.onnx").mkdir()), r"model\.onnx .*refused"),
    "a named pipe": (fifo, r"model\.onnx .*not a regular file"),
    "a linked file": (link("model.onnx"), r"model\.onnx is a link, which is refused"),
    "a linked manifest": (link("manifest.json"), r"manifest\.json is a link"),
    "a parent folder": (listed("../secret"), r"file name '\.\./secret' is refused"),
    "an absolute path": (listed("/etc/passwd"), "file name '/etc/passwd' is refused"),
    "a drive": (listed("C:\\secret"), "is refused"),
    "a folder inside": (listed("a/b"), "is refused"),
    "a hidden file": (listed(".bashrc"), "is refused"),
    "an empty name": (listed(""), "is refused"),
    "a newline": (listed("a\n"), "is refused"),
    "the manifest itself": (listed("manifest.json"), "is refused"),
    "a size that is text": (lambda b: rewrite(b, lambda m: m["files"]["model.onnx"].update(bytes="9")), "bytes is '9'"),
    "a size below 0": (lambda b: rewrite(b, lambda m: m["files"]["model.onnx"].update(bytes=-1)), "bytes is -1"),
    "a half byte": (lambda b: rewrite(b, lambda m: m["files"]["model.onnx"].update(bytes=1.5)), "no whole size"),
    "a hash that is none": (lambda b: rewrite(b, lambda m: m["files"]["model.onnx"].update(sha256="x")), "no SHA-256"),
    "a model not listed": (field(model="other.onnx"), r"model names 'other\.onnx', which is not in its list"),
    "a case not listed": (field(cases=[{"input": "input_0.npy", "output": "x.npy"}]), r"cases\[0\]\.output names 'x"),
    "no case": (field(cases=[]), "cases is empty"),
    "cases as text": (field(cases="all"), "cases is not a list"),
    "too many cases": (field(cases=[{}] * 65), "at most 64"),
    "a case without output": (field(cases=[{"input": "input_0.npy"}]), r"cases\[0\]: field 'output' is missing"),
    "swapped case files": (
        lambda b: rewrite(b, lambda m: m["cases"][0].update(input="output_0.npy")),
        "golden cases differ in shape",
    ),
    "another schema": (field(schema="hwsearch.latency-table"), "is not a bundle's manifest"),
    "a later version": (field(version=2), "has version 2, this hwsearch reads 1"),
    "a version that is true": (field(version=True), "has version True"),
    "no version": (lambda b: rewrite(b, lambda m: m.pop("version")), "field 'version' is missing"),
    "a budget as text": (field(budget_ms="fast"), "budget_ms is 'fast'"),
    "a negative budget": (field(budget_ms=-1), "budget_ms is -1"),
    "a budget of NaN": (manifest_text('{"schema": "hwsearch.bundle", "budget_ms": NaN}'), "not valid JSON .*NaN"),
    "a tolerance of 1": (field(tolerance={"relative": 1, "absolute": 0}), "tolerance: relative is 1, not a number"),
    "no tolerance": (field(tolerance=None), "tolerance is None"),
    "text": (manifest_text("hello"), "not valid JSON"),
    "a list": (manifest_text("[]"), "not a JSON object"),
    "nothing": (manifest_text(""), "not valid JSON"),
    "deep nesting": (manifest_text("[" * 100_000), "not valid JSON"),
    "a large manifest": (manifest_text(" " * (1 << 20) + "{}"), r"manifest\.json has 1048578 bytes"),
    "a pickled array": (pickled, r"input_0\.npy is not a plain \.npy array"),
    "a header that asks for gigabytes": (huge_header, r"input_0\.npy holds float32 \(999999999,\) by its header"),
    "an array that is none": (lambda b: replace_file(b, "input_0.npy", b"\x93NUMPY"), "not a plain"),
    "weights in another file": (outside_weights, r"model\.onnx keeps weights in another file"),
    "a model that is text": (lambda b: replace_file(b, "model.onnx", b"hello"), r"model\.onnx is not an ONNX model"),
    "a model that is empty": (lambda b: replace_file(b, "model.onnx", b""), "holds no graph"),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_a_manifest_does_not_vouch_for_is_refused(case: str, bundle: Path) -> None:
    change, message = REFUSED[case]
    change(bundle)
    with pytest.raises(SchemaError, match=message) as error:
        read_bundle(bundle)
    assert "\n" not in str(error.value)


def test_no_bundle_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        read_bundle(tmp_path / "missing")
    with pytest.raises(InputError, match=r"holds no manifest\.json"):
        read_bundle(tmp_path)


def test_random_damage_never_leads_to_another_error(bundle: Path) -> None:
    """Bytes of the manifest, the model or an array are changed (hashes mended): read or refused, nothing else."""
    rng = np.random.default_rng(0)
    messages: list[str] = []
    for number in range(120):
        name = ("model.onnx", "input_0.npy", "output_1.npy", "manifest.json")[number % 4]
        original = (bundle / name).read_bytes()
        manifest = (bundle / "manifest.json").read_bytes()
        content = bytearray(original)
        for _ in range(int(rng.integers(1, 4))):
            content[int(rng.integers(len(content)))] = int(rng.integers(256))
        if number % 3 == 0:
            content = content[: int(rng.integers(len(content)))]
        try:
            if name == "manifest.json":
                (bundle / name).write_bytes(bytes(content))
            else:
                replace_file(bundle, name, bytes(content))
            read_bundle(bundle)
        except HwsearchError as error:
            messages.append(str(error))
        finally:
            (bundle / name).write_bytes(original)
            (bundle / "manifest.json").write_bytes(manifest)
    assert len(messages) > 60
    assert not any("\n" in message for message in messages)


def test_reading_needs_no_torch_and_no_onnx(bundle: Path) -> None:
    code = (
        "import sys; from hwsearch.deploy.reader import read_bundle; from hwsearch.deploy import verdict;"
        f"read_bundle({str(bundle)!r});"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'pydantic', 'rich', 'xgboost'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- refusals of deploy ---


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "fast"])
def test_a_budget_must_be_a_number_above_zero(value: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"budget_ms is .*: give milliseconds above 0"):
        deploy(network(), torch.zeros(1, 1, 8, 8), DEVICE, tmp_path / "b", budget_ms=value)  # type: ignore[arg-type]


def test_a_folder_with_other_things_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds other things \(thesis\.tex\)"):
        deploy(network(), torch.zeros(1, 1, 8, 8), DEVICE, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "bundle", Path("/proc/hwsearch/bundle")):
        with pytest.raises(InputError, match="cannot write"):
            deploy(network(), torch.zeros(1, 1, 8, 8), DEVICE, folder)


def test_a_failed_write_leaves_the_old_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        deploy(network(), torch.zeros(1, 1, 8, 8), DEVICE, bundle, budget_ms=9.0)
    assert read_bundle(bundle).budget_ms == 1.5
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="in training mode"):
        deploy(network().train(), torch.zeros(1, 1, 8, 8), DEVICE, tmp_path / "b")


def test_outputs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(UnsupportedModelError, match="returns tuple"):
        deploy(Pair().eval(), torch.zeros(1, 1, 8, 8), DEVICE, tmp_path / "b")
    broken = network()
    broken[5].weight.data[0] = float("nan")  # type: ignore[index,union-attr]
    with pytest.raises((CheckFailedError, UnsupportedModelError)):
        deploy(broken, torch.zeros(1, 1, 8, 8), DEVICE, tmp_path / "b")
