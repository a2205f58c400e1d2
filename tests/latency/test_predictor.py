"""The predictor: accuracy where the truth is known, stairs, intervals, files, refusals, determinism."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError, SkipTestWarning

from hwsearch.device.runtime_simulated import kernel_ms
from hwsearch.device.spec import Fingerprint
from hwsearch.errors import InputError, SchemaError
from hwsearch.graph.kernel import Kernel
from hwsearch.latency.base import CACHE_MB, fit_base
from hwsearch.latency.features import weight_mb
from hwsearch.latency.predictor import LatencyPredictor, OutOfRangeWarning
from hwsearch.latency.table import LatencyTable, NetworkSample
from hwsearch.latency.training import Rows

FINGERPRINT = Fingerprint("cpu", "avx2", "onnxruntime", "1.31.1", 1, "float32", "Linux x86_64", "unknown")
QUICK = {"rounds": 25, "folds": 3}


def conv(rng: np.random.Generator, layout: str = "nchwc") -> Kernel:
    side, channels, out = int(rng.choice([4, 7, 14, 28])), int(rng.integers(1, 20)) * 8, int(rng.integers(1, 20)) * 8
    space = {"in_height": side, "in_width": side, "out_height": side, "out_width": side}
    taps = {"kernel_height": 3, "kernel_width": 3, "in_channels": channels, "out_channels": out}
    return Kernel("conv", "Conv", layout_in=layout, layout_out=layout, **space, **taps)


def pool(rng: np.random.Generator) -> Kernel:
    channels = int(rng.integers(1, 200))
    return Kernel("global_pool", "ReduceMean", in_channels=channels, in_height=14, in_width=14, out_channels=channels)


def made_up(
    networks: int, *, profiler_ms: float = 0.0, overhead_ms: float = 0.0, cache_mb: float | None = None
) -> LatencyTable:
    """A table under a law that is known: MACs, bytes, a remainder of blocks at half speed, and a profiler that adds."""
    rng = np.random.default_rng(5)
    samples = []
    shared = [conv(rng) for _ in range(120)] + [pool(rng) for _ in range(30)]
    for number in range(networks):
        kernels = tuple(shared[i] for i in rng.integers(0, len(shared), int(rng.integers(3, 30))))
        ms = np.array([k.macs / 4e7 + k.memory_bytes / 2e7 + 1e-3 for k in kernels])
        megabytes = weight_mb(kernels)
        if cache_mb is not None and megabytes.sum() > cache_mb:
            ms = ms + megabytes * 0.1
        seen = ms + profiler_ms
        total = float(ms.sum()) + overhead_ms
        node_ms = tuple((seen / seen.sum() * total).tolist())
        samples.append(NetworkSample(f"{number:04d}", f"f{number % 3}", kernels, node_ms, total, total, total, 0.01, 9))
    return LatencyTable("toy", FINGERPRINT, 0.5, 0.01, tuple(samples))


def test_an_additive_law_is_recovered() -> None:
    table = made_up(90)
    predictor = LatencyPredictor(**QUICK).fit(table)
    assert np.abs(np.expm1(predictor.log_errors_)).mean() < 0.005
    sample = table.networks[0]
    found = predictor.network(sample.kernels)
    assert found.ms == pytest.approx(sample.measured_ms, rel=0.01)
    assert sum(found.kernel_ms) + predictor.overhead_ms == pytest.approx(found.ms)
    assert found.low_ms <= found.ms <= found.high_ms
    assert found.coverage == 1.0
    assert found.unknown == ()


def test_what_the_profiler_adds_is_found_and_taken_out() -> None:
    rows = Rows.of(made_up(120, profiler_ms=0.005).networks)
    assert rows.profiler_ms() == pytest.approx(0.005, abs=1e-3)
    predictor = LatencyPredictor(**QUICK).fit(made_up(120, profiler_ms=0.005))
    table = made_up(120)
    assert np.abs(np.expm1(predictor.log_errors_)).mean() < 0.02
    truth = np.array(table.networks[0].node_ms)
    error = np.abs(predictor.predict(table.networks[0].kernels) / truth - 1)
    assert np.average(error, weights=truth) < 0.05


def test_the_overhead_of_a_network_is_found() -> None:
    predictor = LatencyPredictor(**QUICK).fit(made_up(150, overhead_ms=0.05))
    assert predictor.overhead_ms == pytest.approx(0.05, rel=0.3)


def test_weights_beyond_a_cache_cost_more() -> None:
    table = made_up(150, cache_mb=2.0)
    rows = Rows.of(table.networks)
    base = fit_base(rows, 0.0)
    assert base.context_ms(np.array([0.1, 0.4])).sum() < 0.02
    assert base.context_ms(np.array([12.0]))[0] == pytest.approx(0.1, rel=0.35)
    rising = base.context_ms(np.array([0.1, *CACHE_MB, 100.0]))
    assert (np.diff(rising) >= 0).all()
    with_context = LatencyPredictor(**QUICK).fit(table)
    assert np.abs(np.expm1(with_context.log_errors_)).mean() < 0.05


def test_an_implementation_fifty_times_slower_is_priced_apart() -> None:
    rng = np.random.default_rng(6)
    samples = []
    for number in range(90):
        shapes = [conv(rng, "nhwc") for _ in range(int(rng.integers(3, 20)))]
        slow = rng.random(len(shapes)) < 0.3
        kernels = tuple(
            replace(k, op=f"Convolution/{'ref' if s else 'jit'}") for k, s in zip(shapes, slow, strict=True)
        )
        ms = np.array([k.macs / 4e7 * (50 if s else 1) + 1e-3 for k, s in zip(kernels, slow, strict=True)])
        total = float(ms.sum())
        samples.append(NetworkSample(f"{number:04d}", "f", kernels, tuple(ms.tolist()), total, total, total, 0.01, 9))
    predictor = LatencyPredictor(**QUICK).fit(LatencyTable("toy", FINGERPRINT, 0.5, 0.01, tuple(samples)))
    assert np.abs(np.expm1(predictor.log_errors_)).mean() < 0.05


def test_unseen_networks_of_the_simulated_device(campaign: Any) -> None:
    checked = campaign.predictor.cross_validation_
    error = np.abs(checked.predicted_ms / checked.measured_ms - 1)
    assert error.mean() < 0.05
    assert (error < 0.10).mean() > 0.9


def test_kernels_come_out_as_they_are(campaign: Any) -> None:
    from hwsearch.device import runtime_simulated

    options = runtime_simulated._options(campaign.device)
    kernels = [k for n in campaign.table.networks[:20] for k in n.kernels if k.family in ("conv", "pointwise")]
    truth = np.array([1.03 * kernel_ms(k, options) for k in kernels])
    error = np.abs(campaign.predictor.predict(kernels) / truth - 1)
    assert np.average(error, weights=truth) < 0.06


def test_one_block_more_is_a_step_up(campaign: Any) -> None:
    space = {"in_height": 14, "in_width": 14, "out_height": 14, "out_width": 14}
    taps = {"kernel_height": 3, "kernel_width": 3, "in_channels": 64}
    blocked = {"layout_in": "nchwc", "layout_out": "nchwc", "fused": ("relu",)}
    kernels = [Kernel("conv", "Conv", out_channels=c, **space, **taps, **blocked) for c in (64, 72)]
    low, high = campaign.predictor.predict(kernels)
    assert high > 1.04 * low


def test_equal_tables_give_equal_predictors(campaign: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        LatencyPredictor(rounds=5, folds=2).fit(campaign.table).save(tmp_path / name)
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [p.name for p in one] == [p.name for p in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))


def test_a_loaded_predictor_answers_alike(campaign: Any, tmp_path: Path) -> None:
    campaign.predictor.save(tmp_path)
    loaded = LatencyPredictor.load(tmp_path, campaign.table.fingerprint)
    for sample in campaign.table.networks[:5]:
        assert loaded.network(sample.kernels) == campaign.predictor.network(sample.kernels)
    assert loaded.get_params() == campaign.predictor.get_params()
    assert not [p for p in tmp_path.iterdir() if p.suffix not in (".json", ".ubj")], "no pickles"


@pytest.mark.parametrize(
    ("field", "value"),
    [("runtime_version", "1.30.0"), ("isa", "avx512f"), ("precision", "float16"), ("threads", 2), ("cpu", "other")],
)
def test_another_runtime_or_machine_is_refused_with_both_named(tmp_path: Path, field: str, value: Any) -> None:
    LatencyPredictor(rounds=0, folds=2).fit(made_up(10)).save(tmp_path)
    with pytest.raises(InputError, match=field) as caught:
        LatencyPredictor.load(tmp_path, replace(FINGERPRINT, **{field: value}))
    assert repr(value) in str(caught.value)
    assert repr(getattr(FINGERPRINT, field)) in str(caught.value)
    LatencyPredictor.load(tmp_path, replace(FINGERPRINT, governor="performance", system="Linux other"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    LatencyPredictor(rounds=3, folds=2).fit(made_up(12)).save(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 9}, "version 9"),
        ({"schema": "x"}, "'x'"),
        ({"calibration": {"a": "fast"}}, "fast|calibration"),
        ({"log_errors": []}, "out-of-fold"),
        ({"intervals": {"a": 0.01, "b": 0.0, "scores": []}}, "out-of-fold"),
        ({"profiled": {"conv": [[1, 2]]}}, "reshape|profiled"),
        ({"parameters": {"depth": 3}}, "depth"),
        ({"model": {}}, "model|files"),
    ],
)
def test_a_damaged_manifest(saved: Path, tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    shutil.copytree(saved, tmp_path / "p")
    path = tmp_path / "p" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SchemaError, match=complaint) as caught:
        LatencyPredictor.load(tmp_path / "p")
    assert "\n" not in str(caught.value)


def test_damaged_missing_and_foreign_files(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "p")
    conv_file, path = tmp_path / "p" / "conv.ubj", tmp_path / "p" / "manifest.json"
    whole = conv_file.read_bytes()
    conv_file.write_bytes(whole[:-10])
    with pytest.raises(SchemaError, match="SHA-256"):
        LatencyPredictor.load(tmp_path / "p")
    conv_file.unlink()
    with pytest.raises(SchemaError, match=r"conv\.ubj cannot be read"):
        LatencyPredictor.load(tmp_path / "p")
    manifest = json.loads(path.read_text())
    manifest["model"]["files"] = {"../../secret.ubj": "0"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(SchemaError, match="secret"):
        LatencyPredictor.load(tmp_path / "p")
    with pytest.raises(InputError, match="hwsearch fit"):
        LatencyPredictor.load(tmp_path / "nothing")


def test_what_was_never_profiled_is_said_and_widens_the_interval(campaign: Any) -> None:
    predictor, kernels = campaign.predictor, campaign.table.networks[0].kernels
    known = predictor.network(kernels)
    strange = [
        replace(kernels[0], family="other", op="LSTM", node="007_LSTM"),
        replace(kernels[0], op="Winograd", node="008_Winograd"),
        replace(kernels[0], batch=4096, node="009_big"),
    ]
    for kernel in strange:
        found = predictor.network([*kernels, kernel])
        assert 0 < found.coverage < 1
        assert len(found.unknown) == len(known.unknown) + 1
        assert found.unknown[-1].startswith(kernel.node)
        assert found.kernel_ms[-1] > 0
        assert found.high_ms / found.ms > known.high_ms / known.ms


@pytest.mark.parametrize("level", [0, 1, -0.5, float("nan"), "0.9"])
def test_a_senseless_level(campaign: Any, level: Any) -> None:
    with pytest.raises(InputError, match="level"):
        campaign.predictor.network(campaign.table.networks[0].kernels, level)


def test_it_is_an_estimator() -> None:
    predictor = LatencyPredictor(rounds=7, seed=3)
    copy = clone(predictor)
    assert copy.get_params() == predictor.get_params()
    assert copy.set_params(rounds=8).rounds == 8
    with pytest.raises(NotFittedError, match="fit"):
        predictor.predict([])
    with pytest.raises(InputError, match="without kernels"):
        predictor.fit(made_up(6)).network([])
    assert predictor.predict([]).shape == (0,)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rounds", -1), ("rounds", 1.5), ("max_depth", 0), ("folds", 1), ("seed", True), ("learning_rate", 0),
     ("learning_rate", 2), ("subsample", float("nan")), ("l2", -1), ("network_weight", "much")],
)  # fmt: skip
def test_senseless_settings(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        LatencyPredictor(**{name: value}).fit(made_up(3))


def test_tiny_and_empty_tables() -> None:
    with pytest.raises(InputError, match="empty"):
        LatencyPredictor().fit(made_up(0))
    for networks in (1, 2, 5):
        table = made_up(networks)
        found = LatencyPredictor(rounds=3).fit(table).network(table.networks[0].kernels)
        assert 0 < found.low_ms <= found.ms <= found.high_ms < 100


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    LatencyPredictor(rounds=1, folds=3).fit(made_up(9), progress=lambda done, of, text: told.append((done, of)))
    assert told == [(0, 3), (1, 3), (2, 3), (0, 3), (1, 3), (2, 3), (1, 1)], "folds, held-out families, the whole"


def test_it_is_a_scikit_learn_estimator() -> None:
    """It fits on a ``LatencyTable``, which no check can make up, and says so in its tags; all the other checks pass."""
    from sklearn.utils import estimator_checks as checks

    with pytest.warns(SkipTestWarning, match="two_d_array=False"):
        found = checks.check_estimator(LatencyPredictor(), on_fail="raise")
    assert {result["status"] for result in found} == {"passed"}
    names = (
        "estimator_tags_renamed", "valid_tag_types", "estimator_repr", "no_attributes_set_in_init", "mixin_order",
        "do_not_raise_errors_in_init_or_set_params", "parameters_default_constructible", "get_params_invariance",
        "set_params",
    )  # fmt: skip
    for name in names:
        getattr(checks, f"check_{name}")("LatencyPredictor", LatencyPredictor())
    with pytest.raises(InputError, match="takes a LatencyTable, not a ndarray"):
        LatencyPredictor().fit(np.zeros((4, 2)))  # type: ignore[arg-type]


def test_kernels_out_of_range_are_warned_of_or_refused() -> None:
    table = made_up(40)
    strange = Kernel("other", "Einsum", in_channels=8, out_channels=8, node="7_Einsum")
    known = table.networks[0].kernels
    with pytest.warns(OutOfRangeWarning, match=rf"1 of {len(known) + 1} kernels .*7_Einsum"):
        found = LatencyPredictor(**QUICK).fit(table).network((*known, strange))
    assert found.coverage < 1
    assert found.high_ms > found.ms
    strict = LatencyPredictor(**QUICK, out_of_range="raise").fit(table)
    assert strict.network(known).coverage == 1.0
    for call in (strict.network, strict.predict):
        with pytest.raises(InputError, match="profile the device with this model"):
            call((*known, strange))
    with pytest.raises(InputError, match="out_of_range is 'ignore'"):
        LatencyPredictor(out_of_range="ignore").fit(table)


def test_the_ninetieth_percentile_follows_the_table(tmp_path: Path) -> None:
    table = made_up(60)
    slow = tuple(replace(n, raw_p90_ms=n.raw_p50_ms * 1.2 * n.measured_ms**-0.05) for n in table.networks)
    predictor = LatencyPredictor(**QUICK).fit(table.with_networks(slow))
    assert predictor.p90_ms(np.array([0.01, 1.0])) == pytest.approx([0.01 * 1.2 * 0.01**-0.05, 1.2], rel=1e-3)
    assert predictor.network(slow[0].kernels).p90_ms > predictor.network(slow[0].kernels).ms
    predictor.save(tmp_path)
    assert LatencyPredictor.load(tmp_path).p90_ == predictor.p90_


def test_the_better_trees_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Among the trees it compares; never below so many networks, and a loaded predictor knows which they are."""
    from hwsearch.latency import predictor as module

    rng, samples = np.random.default_rng(3), []
    for number in range(40):
        kernels = tuple(conv(rng) for _ in range(12))
        # No line and no single split tells this, and no kernel comes twice.
        bends = np.array([1 + (k.in_channels > 80) * (k.out_channels > 80) * (k.in_height > 7) for k in kernels])
        ms = bends * np.array([k.macs / 4e7 + 1e-3 for k in kernels])
        total = float(ms.sum())
        node_ms = tuple(ms.tolist())
        samples.append(NetworkSample(f"{number:04d}", f"f{number % 3}", kernels, node_ms, total, total, total, 0.01, 9))
    table = LatencyTable("toy", FINGERPRINT, 0.5, 0.01, tuple(samples))
    asked = {"rounds": 12, "folds": 2}
    monkeypatch.setattr(module, "OTHERS", ({"max_depth": 6}, {"max_depth": 1}))
    assert LatencyPredictor(max_depth=2, **asked).fit(table).settings_.max_depth == 2
    monkeypatch.setattr(module, "TUNED_FROM", 40)
    plain = LatencyPredictor(max_depth=1, tune=False, **asked).fit(table)
    tuned = LatencyPredictor(max_depth=1, **asked).fit(table)
    assert (plain.settings_.max_depth, tuned.settings_.max_depth) == (1, 6)
    before, after = (np.abs(found.cross_validation_.log_error).mean() for found in (plain, tuned))
    assert after < before
    tuned.save(tmp_path)
    assert LatencyPredictor.load(tmp_path).settings_ == tuned.settings_
