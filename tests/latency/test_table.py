"""The table: what is saved comes back, equal measurements give equal bytes, and damage is named by file and line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwsearch.device.spec import Fingerprint
from hwsearch.errors import InputError, SchemaError
from hwsearch.graph.kernel import FAMILIES, Kernel
from hwsearch.latency.table import LatencyTable, NetworkSample

FINGERPRINT = Fingerprint("cpu", "avx2", "onnxruntime", "1.31.1", 1, "float32", "Linux x86_64", "performance")


def sample(name: str = "a", *, kernels: int = 2, ms: float = 1.5, source: str = "random:vgg") -> NetworkSample:
    conv = Kernel("conv", "Conv", layout_in="nchwc", layout_out="nchwc", fused=("add", "relu"), in_channels=16,
                  out_channels=32, kernel_height=3, kernel_width=3, node="000_Conv")  # fmt: skip
    return NetworkSample(
        id=name,
        source=source,
        kernels=tuple(replace(conv, node=f'{i:03d}_Conv, "quoted"') for i in range(kernels)),
        node_ms=(ms / kernels,) * kernels,
        measured_ms=ms,
        raw_p50_ms=1.1 * ms,
        raw_p90_ms=1.4 * ms,
        spread=0.01,
        rounds=11,
        seconds=0.3,
    )


def table(*networks: NetworkSample) -> LatencyTable:
    return LatencyTable("toy", FINGERPRINT, 0.5, 0.03, networks or (sample("b"), sample("a")))


def test_what_is_saved_comes_back_sorted(tmp_path: Path) -> None:
    table().save(tmp_path)
    loaded = LatencyTable.load(tmp_path)
    assert [n.id for n in loaded.networks] == ["a", "b"]
    assert loaded == table().with_networks(table().networks)
    assert loaded.networks[0].kernels[0].node == '000_Conv, "quoted"'
    assert loaded.kernel_count == 4
    assert loaded.sources == ("random:vgg",)


def test_equal_tables_are_equal_bytes(tmp_path: Path) -> None:
    table(sample("a"), sample("b")).save(tmp_path / "one")
    table(sample("b"), sample("a")).save(tmp_path / "two")
    for name in ("manifest.json", "networks.csv", "kernels.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["kernels.csv", "manifest.json", "networks.csv"]


positive = st.floats(1e-6, 1e6, allow_nan=False)
counts = st.integers(0, 10_000)
printable = st.text().filter(lambda s: s.isprintable())
kernels_ = st.builds(
    Kernel, family=st.sampled_from(FAMILIES), op=printable.filter(bool), in_channels=counts, out_width=counts,
    fused=st.lists(st.sampled_from(["add", "relu", "clip"])).map(tuple), groups=counts, node=printable,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(kernels_, positive), min_size=1, max_size=4), positive, st.integers(1, 99))
def test_any_sample_survives_the_files(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Kernel, float]], ms: float, rounds: int
) -> None:
    folder = tmp_path_factory.mktemp("table")
    original = table(
        NetworkSample("x", "s", tuple(k for k, _ in rows), tuple(t for _, t in rows), ms, ms, ms, 0.0, rounds)
    )
    original.save(folder)
    assert LatencyTable.load(folder) == original


def damage(folder: Path, name: str, line: int, old: str, new: str) -> None:
    lines = (folder / name).read_text().split("\n")
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    (folder / name).write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("name", "line", "old", "new", "complaint"),
    [
        ("networks.csv", 3, "1.5", "nan", "line 3: measured_ms is 'nan'"),
        ("networks.csv", 3, "1.5", "0.0", "line 3: measured_ms is '0.0'"),
        ("networks.csv", 2, "1.5", "-1.5", "line 2: measured_ms is '-1.5'"),
        ("networks.csv", 2, "1.5", "quick", "line 2: measured_ms is 'quick'"),
        ("networks.csv", 3, "b,", "a,", "line 3: network 'a' is there twice"),
        ("networks.csv", 2, ",11,", ",eleven,", "line 2: rounds is 'eleven'"),
        ("networks.csv", 1, "id", "ids", "line 1: the columns are not"),
        ("networks.csv", 2, ",2", "", "line 2: 8 cells instead of 9"),
        ("kernels.csv", 4, "0.75", "inf", "line 4: ms is 'inf'"),
        ("kernels.csv", 2, "a,0,", "a,1,", "line 2: kernel 1 of network 'a' where 0 was due"),
        ("kernels.csv", 3, "conv,Conv", "konv,Conv", "line 3: unknown kernel family 'konv'"),
        ("kernels.csv", 3, ",16,", ",-16,", "line 3: in_channels is '-16'"),
        ("networks.csv", 2, "random:vgg", "random:VGG", "SHA-256"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, name: str, line: int, old: str, new: str, complaint: str) -> None:
    table().save(tmp_path)
    damage(tmp_path, name, line, old, new)
    with pytest.raises(SchemaError, match=name) as caught:
        LatencyTable.load(tmp_path)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["networks.csv", "kernels.csv"])
def test_a_truncated_file_is_refused_wherever_it_was_cut(tmp_path: Path, name: str) -> None:
    table().save(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for cut in range(0, len(whole), 7):
        (tmp_path / name).write_bytes(whole[:cut])
        with pytest.raises(SchemaError, match=r"\.csv"):
            LatencyTable.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"schema": "other"}, "schema is 'other'"), ({"version": 99}, "version 99"),
     ({"reference_ms": "fast"}, "fast"),
     ({"fingerprint": {"cpu": 1}}, "fingerprint"), ({"files": {}}, "networks.csv"),
     ({"noise_floor": -1}, "noise_floor")],
)  # fmt: skip
def test_another_manifest_is_refused(tmp_path: Path, change: dict, complaint: str) -> None:
    table().save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SchemaError, match=complaint):
        LatencyTable.load(tmp_path)


def test_no_table_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hwsearch profile"):
        LatencyTable.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{\n"schema": ')
    with pytest.raises(SchemaError, match="line 2"):
        LatencyTable.load(tmp_path)


@pytest.mark.parametrize(
    "bad",
    [replace(sample(), measured_ms=float("nan")), replace(sample(), node_ms=(1.0, 0.0)),
     replace(sample(), node_ms=(1.0,)), replace(sample(), raw_p90_ms=-1.0), replace(sample(), spread=float("inf")),
     replace(sample(), kernels=(), node_ms=())],
)  # fmt: skip
def test_a_table_that_no_measurement_can_be_is_not_written(tmp_path: Path, bad: NetworkSample) -> None:
    with pytest.raises(InputError, match="'a'"):
        table(bad).save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_read_only_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the table"):
        table().save(tmp_path / "file" / "table")


def test_merge_rescales_and_keeps_the_steadier_measurement() -> None:
    mine = table(sample("a", ms=1.0), sample("b", ms=2.0))
    steadier = replace(sample("b", ms=6.0), spread=0.001)
    other = replace(table(replace(sample("a", ms=9.0), spread=0.5), steadier, sample("c")), reference_ms=1.0)
    merged = mine.merge(other)
    assert {n.id: n.measured_ms for n in merged.networks} == {"a": 1.0, "b": 3.0, "c": 0.75}
    assert merged.networks[1].raw_p50_ms == pytest.approx(6.6)
    assert sum(merged.networks[1].node_ms) == pytest.approx(3.0)


def test_tables_of_different_runtimes_do_not_merge() -> None:
    other = replace(table(), fingerprint=replace(FINGERPRINT, runtime_version="1.30.0"))
    with pytest.raises(InputError, match=r"1\.31\.1 against 1\.30\.0"):
        table().merge(other)
