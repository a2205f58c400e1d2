"""A report is one file that loads nothing, escapes everything, and says what it lacks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hwsearch.errors import InputError
from hwsearch.report import report
from hwsearch.report.figures_run import trained
from hwsearch.report.run_data import Row

DAMAGE = ["", "{", "[]", "null", "3", '{"rows": 3}', '{"limits": [[]], "candidates": {}}', "[[[]]]"]
FILES = [
    "result.json", "summary.json", "config.json", "explain.json", "space.json", "kernels.json", "bundle/manifest.json",
    "bundle/verdict.json",
]  # fmt: skip
VOID = {"meta", "link", "br", "img", "input", "hr"}
LOADS = {"src", "href", "srcset", "data", "action", "poster", "formaction", "background", "xlink:href"}


class Outline(HTMLParser):
    """Tags, attributes and visible text; notes what is not balanced or would be requested."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.requests: list[str] = []
        self.handlers: list[str] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.style = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in LOADS and not (value or "").startswith("data:"):
                self.requests.append(f"<{tag} {name}={value}>")
            if name.startswith("on"):
                self.handlers.append(name)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside == "style":
            self.style += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def parse(page: str) -> Outline:
    outline = Outline()
    outline.feed(page)
    outline.close()
    return outline


def read(path: Path) -> tuple[str, Outline]:
    page = path.read_text(encoding="utf-8")
    return page, parse(page)


def figures(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1], parse_constant=pytest.fail)


def change(path: Path, edit: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_a_whole_run_shows_its_answer_and_every_section(run_folder: Path) -> None:
    page, outline = read(report(run_folder))
    for words in (
        "1.45 ms measured, inside the 1.50 ms budget", "96.5 % of the budget is used", "2.0 times as fast",
        "0.65 points less accuracy (91.13 %)", "raw median 1.48 ms", "Comparison", "Accuracy against milliseconds",
        "The search's 400 candidates", "Widths",
        "Where the time goes", "Kernel by kernel", "How good the prediction is", "Training", "Provenance", "AMD EPYC",
        "14.2 M", "310 k", "outputs agree", "Why it is not faster", "28 would save 0.12 ms (8 %)",
    ):  # fmt: skip
        assert words in outline.text, words
    assert len(figures(page)) == 13
    assert outline.text.index("budget") < outline.text.index("Comparison")


def test_it_is_one_balanced_file_that_requests_nothing(run_folder: Path) -> None:
    page, outline = read(report(run_folder))
    assert outline.unbalanced == []
    assert outline.open == []
    assert outline.requests == []
    assert outline.handlers == []
    assert "url(" not in outline.style
    assert "@import" not in outline.style
    assert "default-src 'none'" in page
    assert outline.tags.count("script") == 3
    assert sum("plotly.js v" in script for script in outline.scripts) == 1
    assert not {"iframe", "object", "embed", "base", "form"} & set(outline.tags)


def test_equal_runs_give_equal_pages(run_folder: Path, tmp_path: Path) -> None:
    first = report(run_folder, tmp_path / "a.html").read_bytes()
    assert first == report(run_folder, tmp_path / "b.html").read_bytes()


HOSTILE = "</script><script>alert(1)</script><img src=http://x/ onerror=alert(2)>\"'&amp;\u2028%{x}"


def poisoned(value: Any, keep: set[str]) -> Any:
    """Every text gets markup appended, and so does every key that no reader looks for."""
    if isinstance(value, dict):
        named = {"name": "found"} if value.get("name") == "found" else {}
        return {k if k in keep else f"{k}{HOSTILE}"[:150]: poisoned(v, keep) for k, v in value.items()} | named
    if isinstance(value, list):
        return [poisoned(item, keep) for item in value]
    stays = ("hwsearch.verdict", "hwsearch.bundle", "hwsearch.explanation", "hwsearch.kernel_times", "pass")
    return value + HOSTILE if isinstance(value, str) and value not in stays else value


def test_names_from_files_are_text_never_markup(run_folder: Path) -> None:
    for name in FILES:
        data = json.loads((run_folder / name).read_text())
        keep = {k for k in all_keys(data) if re.fullmatch(r"[a-z_0-9]{1,20}", k)} - {"threads", "cpu"}
        (run_folder / name).write_text(json.dumps(poisoned(data, keep)))
    events = [{"event": "train", "phase": HOSTILE, "step": s, "loss": 1.0 / s} for s in range(1, 9)]
    events += [{"event": HOSTILE, "seconds": 3.0}]
    (run_folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    page, outline = read(report(run_folder))
    assert outline.tags.count("script") == 3
    assert outline.tags.count("img") == 0
    assert (outline.unbalanced, outline.requests, outline.handlers) == ([], [], [])
    assert "alert(1)" in outline.text
    labels = [value for value in all_strings(figures(page)) if "alert" in value]
    assert labels
    assert not any("<img" in value or "<script" in value for value in labels)


def all_keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {k for v in value.values() for k in all_keys(v)}
    return {k for v in value for k in all_keys(v)} if isinstance(value, list) else set()


def all_strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [s for k, v in value.items() for s in [k, *all_strings(v)]]
    if isinstance(value, list):
        return [s for v in value for s in all_strings(v)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("result.json", "result.json lists no candidates."),
        ("summary.json", "summary.json lists no kernels"),
        ("events.jsonl", "No training curve is recorded."),
        ("bundle/verdict.json", "Not verified"),
        ("bundle/manifest.json", "Provenance"),
        ("config.json", "Provenance"),
        ("explain.json", "hwsearch estimate"),
    ],
)
def test_a_section_without_its_data_says_so(missing: str, line: str, run_folder: Path) -> None:
    (run_folder / missing).unlink()
    _, outline = read(report(run_folder))
    assert line in outline.text
    assert outline.unbalanced == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_file_is_left_out_and_named(name: str, content: str, run_folder: Path) -> None:
    (run_folder / name).write_text(content)
    _, outline = read(report(run_folder))
    assert outline.unbalanced == []
    if content in ("", "{"):
        assert f"Left out: {Path(name).name}" in outline.text or name == "bundle/verdict.json"
        assert Path(name).name in outline.text


def test_values_of_other_kinds_are_left_out(run_folder: Path) -> None:
    """Every number of the files becomes each of these once."""
    for bad in (None, "many", [], {}, True, -1, 1e400, float("nan")):
        for name in (
            "result.json",
            "summary.json",
            "bundle/manifest.json",
            "explain.json",
            "space.json",
            "kernels.json",
        ):
            original = (run_folder / name).read_text()

            def spoil(value: Any, bad: Any = bad) -> Any:
                if isinstance(value, dict):
                    return {k: spoil(v) for k, v in value.items()}
                if isinstance(value, list):
                    return [spoil(v) for v in value]
                return bad if isinstance(value, int | float) else value

            (run_folder / name).write_text(json.dumps(spoil(json.loads(original))))
            page, outline = read(report(run_folder))
            assert outline.unbalanced == []
            assert "nan" not in outline.text.lower().replace("provenance", "")
            assert figures(page)
            (run_folder / name).write_text(original)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "search_started", "step": 1}\n{"torn')
    page, outline = read(report(tmp_path))
    assert "this run has no result yet" in outline.text
    assert "plotly.js" not in page  # no figure, no library: the page is small
    assert "damaged" not in outline.text  # a torn last line is what a kill leaves


def test_torn_and_foreign_lines_in_the_middle_are_counted(run_folder: Path) -> None:
    path = run_folder / "events.jsonl"
    path.write_text("torn{\n[1]\n" + path.read_text())
    assert "events.jsonl: 1 damaged line left out" in read(report(run_folder))[1].text


def test_a_result_alone_is_enough_for_a_headline(run_folder: Path) -> None:
    (run_folder / "summary.json").unlink()
    shutil.rmtree(run_folder / "bundle")
    _, outline = read(report(run_folder))
    assert "1.45 ms measured, inside the 1.50 ms budget" in outline.text
    assert "Not verified" in outline.text


def test_a_broken_budget_is_said_first(run_folder: Path) -> None:
    change(
        run_folder / "bundle/verdict.json",
        lambda v: v.update(status="fail", measured_ms=1.61, reasons=["measured 1.61 ms is above the budget"]),
    )
    page, outline = read(report(run_folder))
    assert "1.61 ms measured, above the 1.50 ms budget" in outline.text
    assert outline.text.index("measured 1.61 ms is above the budget") < outline.text.index("Comparison")
    assert 'class="pill fail"' in page


def test_a_metric_that_is_no_accuracy(run_folder: Path) -> None:
    def edit(summary: Any) -> None:
        summary["metric_name"] = "PSNR"
        for row, value in zip(summary["rows"], (31.2, 30.4, 30.9), strict=True):
            row["metric"] = value
            del row["accuracy"]

    change(run_folder / "summary.json", edit)
    text = read(report(run_folder))[1].text
    assert "PSNR 30.9 against 31.2" in text
    assert "%" not in text[text.index("PSNR 30.9") :][:20]


def test_uniform_scaling_where_that_is_delivered(run_folder: Path) -> None:
    change(run_folder / "summary.json", lambda s: s.update(delivered="uniform", why_delivered="it is better by a hair"))
    page, outline = read(report(run_folder))
    assert "It is better by a hair." in outline.text[: outline.text.index("Comparison")]
    assert "(90.52 %)" in outline.text[: outline.text.index("Comparison")]
    assert '<div class="row found"><span class="name" title="uniform">' in page
    assert '<div class="row found"><span class="name" title="found">' not in page


def test_thousands_of_candidates_are_thinned(run_folder: Path) -> None:
    change(run_folder / "result.json", lambda r: r.update(candidates=r["candidates"] * 50))
    page, outline = read(report(run_folder))
    assert "20,000 candidates" in outline.text
    most = max(sum(len(trace.get("x", [])) for trace in figure["data"]) for figure in figures(page).values())
    assert most < 9000


def test_where_it_is_written(run_folder: Path, tmp_path: Path) -> None:
    assert report(run_folder) == run_folder / "report.html"
    assert report(str(run_folder), tmp_path / "new" / "r.html") == tmp_path / "new" / "r.html"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.html"]
    with pytest.raises(InputError, match=r"cannot write .*: choose a writable place"):
        report(run_folder, run_folder / "config.json" / "r.html")
    with pytest.raises(InputError, match="cannot write"):
        report(run_folder, "/proc/hwsearch.html")


def test_what_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        report(tmp_path / "missing")
    with pytest.raises(InputError, match="is no run folder"):
        report(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(InputError, match="is no run folder"):
        report(tmp_path)


def test_the_trained_networks_stand_at_their_milliseconds(run_folder: Path) -> None:
    page, _ = read(report(run_folder))
    front = figures(page)["figure-1"]
    assert {trace["name"]: (trace["x"], trace["y"]) for trace in front["data"]} == {
        "full": ([2.913], [0.9178]), "uniform": ([1.462], [0.9052]), "found": ([1.447], [0.9113]),
    }  # fmt: skip
    assert front["layout"]["shapes"][0]["x0"] == 1.5
    change(run_folder / "summary.json", lambda s: [row.pop("accuracy") for row in s["rows"]])
    assert figures(read(report(run_folder))[0])["figure-1"]["layout"]["yaxis"]["title"]["text"].startswith("search")


def test_kernels_stand_beside_what_was_measured(run_folder: Path) -> None:
    page, outline = read(report(run_folder))
    (drawn,) = (f for f in figures(page).values() if "kernel, in order" in f["layout"]["xaxis"]["title"]["text"])
    measured = drawn["data"][-1]
    assert measured["name"] == "measured"
    assert sum(measured["y"]) == pytest.approx(1.447, rel=1e-3)
    assert sum(sum(trace["y"]) for trace in drawn["data"][:-1]) == pytest.approx(1.447 * 1.013, rel=1e-3)
    for words in ("measured ms", "predicted against it", "divided as the runtime"):
        assert words in outline.text, words
    for spoil in (lambda k: k.update(version=9), lambda k: k.update(kernels=[]), lambda k: k.update(kernels="many")):
        change(run_folder / "kernels.json", spoil)
        page, outline = read(report(run_folder))
        (drawn,) = (f for f in figures(page).values() if "kernel, in order" in f["layout"]["xaxis"]["title"]["text"])
        assert "measured" not in [trace["name"] for trace in drawn["data"]], "the summary's prediction is left"
        change(run_folder / "kernels.json", lambda k: k.update(version=1))


def test_provenance_tells_releases_data_and_times(run_folder: Path) -> None:
    events = [
        {"event": "run_started", "elapsed_s": 0.0, "hwsearch": "0.0.9", "data": "dataset of the first"},
        {"event": "search_started", "elapsed_s": 20.5},
        {"event": "run_started", "elapsed_s": 0.0, "hwsearch": "0.1.0", "torch": "9.9", "data": "dataset mine 12 ab"},
        {"event": "search_started", "elapsed_s": 1.5}, {"event": "search_finished", "elapsed_s": 4.0},
        {"event": "compared", "elapsed_s": 6.0}, {"event": "compared", "elapsed_s": 6.5},
        {"event": "verified", "elapsed_s": "soon"},
    ]  # fmt: skip
    (run_folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    text = read(report(run_folder))[1].text
    for words in (
        "dataset mine 12 ab",
        "9.9",
        "took: preparation 22.0 s",
        "took: search 2.5 s",
        "took: comparison 2.5 s",
    ):
        assert words in text, words
    assert "0.0.9" not in text


def test_the_cards_intervals_and_residuals(run_folder: Path, tmp_path: Path, made_card: Callable[..., Path]) -> None:
    table = made_card(tmp_path / "table", points=True)
    page, outline = read(report(run_folder, table=table))
    drawn = figures(page)
    (held,) = (f for f in drawn.values() if "measured, inside" in [trace.get("name") for trace in f["data"]])
    counts = {trace["name"]: len(trace["x"]) for trace in held["data"]}
    assert counts["measured, inside"] + counts["measured, outside"] == 240
    assert counts["90 % interval"] == 3 * 240
    boxes = [trace for f in drawn.values() for trace in f["data"] if trace["type"] == "box"]
    assert next((box["y"], box["q1"], box["upperfence"]) for box in boxes) == (["reorder"], [-9.5], [38.0])
    assert "the whiskers nine in ten" in outline.text
    card = json.loads((table / "predictor/card.json").read_text())
    card |= {"bounds": [[1], "x", None], "residuals": {"conv": [1, 2], "gemm": "none"}}
    (table / "predictor/card.json").write_text(json.dumps(card))
    assert len(figures(read(report(run_folder, table=table))[0])) == 15


def test_why_it_is_not_faster(run_folder: Path) -> None:
    page, outline = read(report(run_folder))
    drawn = [figure for figure in figures(page).values() if {t.get("name") for t in figure["data"]} >= {"compute"}]
    assert len(drawn) == 1
    assert [trace["name"] for trace in drawn[0]["data"]] == ["compute", "memory", "overhead"]
    stem = [trace["x"][0] for trace in drawn[0]["data"]]
    assert stem == pytest.approx([0.012, 0.004, 0.004])
    titles = [figure["layout"]["xaxis"]["title"]["text"] for figure in figures(page).values()]
    # The groups whose width moves the time most, the most first.
    assert [title for title in titles if title.startswith("units of")] == [
        "units of head.fc", "units of stages.2.1.conv2", "units of stages.2.1.conv1",
        "units of stages.2.0.conv2",
    ]  # fmt: skip
    fc = next(f for f in figures(page).values() if f["layout"]["xaxis"]["title"]["text"] == "units of head.fc")
    names = [trace["name"] for trace in fc["data"][1:]]
    assert names == ["down to 248", "now 254", "free up to 256"]
    assert "30 as 32" in outline.text


def test_the_width_groups_are_drawn(run_folder: Path) -> None:
    page, outline = read(report(run_folder))
    (drawn,) = (f for f in figures(page).values() if [t.get("name") for t in f["data"]][-2:] == ["reads", "writes"])
    writes, reads = drawn["data"][-1], drawn["data"][-2]
    layers = drawn["layout"]["yaxis"]["ticktext"]
    columns = drawn["layout"]["xaxis"]["ticktext"]
    assert layers[-1] == "classifier"  # it writes no group
    written = {(columns[x], layers[y]) for x, y in zip(writes["x"], writes["y"], strict=True)}
    assert {("stem.0", "stem.0"), ("stem.0", "stem.0.bn")} <= written
    assert (columns[-1], "classifier") in {(columns[x], layers[y]) for x, y in zip(reads["x"], reads["y"], strict=True)}
    for words in ("10^8.1 networks", "8 to 32 (4)", "it is the network's output", "aten.x at a.py:3"):
        assert words in outline.text, words
    (run_folder / "space.json").unlink()
    assert "Width groups" not in read(report(run_folder))[1].text


def test_layer_quality_is_drawn_over_the_epochs(run_folder: Path) -> None:
    def side(layer: str, kind: str, value: float) -> dict[str, Any]:
        return {"parameter": f"{layer}.weight", "side": kind, "quality": value}

    lines = [{"schema": "hwsearch.layer_quality", "version": 1}]
    lines += [
        {"trial": t, "epoch": e, "layers": [side("a", "outputs", t + e / 10), side("b", "inputs", 0.5)]}
        for t in range(2) for e in range(2)
    ]  # fmt: skip
    (run_folder / "state").mkdir(exist_ok=True)
    (run_folder / "state" / "quality.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page, outline = read(report(run_folder))
    maps = [trace for figure in figures(page).values() for trace in figure["data"] if trace.get("type") == "heatmap"]
    assert [(m["x"], m["y"], m["z"]) for m in maps] == [
        (["1.1", "1.2", "2.1", "2.2"], ["a"], [[0, 0.1, 1, 1.1]]),
        (["1.1", "1.2", "2.1", "2.2"], ["b"], [[0.5] * 4]),
    ]
    assert "Quality of the layers" in outline.text


def test_an_explanation_without_stairs_says_why(run_folder: Path) -> None:
    change(run_folder / "explain.json", lambda found: found.update(stairs=[], note="no width space: no stair edges"))
    page, outline = read(report(run_folder))
    assert "No width space: no stair edges." in outline.text
    assert len(figures(page)) == 9
    change(run_folder / "explain.json", lambda found: found.update(version=2))
    assert "has no explain.json that this release reads" in read(report(run_folder))[1].text


def test_files_as_a_run_writes_them(run_folder: Path) -> None:
    """Widths as lists, model and device as sections, curves in checkpoints, a status without a verdict file."""
    from hwsearch.train.checkpoint import save

    result = json.loads((run_folder / "result.json").read_text())

    def edit(summary: Any) -> None:
        del summary["model"], summary["device"]
        summary |= {"groups": result["groups"], "status": "conditional"}
        for row in summary["rows"]:
            row["widths"] = list(row["widths"].values())
            for key in ("low_ms", "high_ms", "kernels"):
                del row[key]

    change(run_folder / "summary.json", edit)
    settings = {"model": {"factory": "hwsearch.models:tiny"}, "device": {"name": "x86-ort-1t"}}
    change(run_folder / "config.json", lambda config: config.update(settings=settings))
    (run_folder / "bundle/verdict.json").unlink()
    (run_folder / "events.jsonl").unlink()
    history = [[step, 2.0 / (1 + step)] for step in range(1, 30)]
    save(run_folder / "state/winner/checkpoint.safetensors", {}, step=30, identity={}, notes={"history": history})
    (run_folder / "state/torn").mkdir()
    (run_folder / "state/torn/checkpoint.safetensors").write_bytes(b"\xff" * 40)
    page, outline = read(report(run_folder))
    assert "hwsearch.models:tiny" in outline.text
    assert 'class="pill conditional"' in page
    assert "1.36 to 1.58" in outline.text  # the interval of the search's result
    assert "192 / 256" in page
    names = [trace.get("name") for figure in figures(page).values() for trace in figure["data"]]
    assert "winner" in names


def test_the_predictors_card(run_folder: Path, tmp_path: Path, made_card: Callable[..., Path]) -> None:
    for points, kind in ((False, "histogram"), (True, "scatter")):
        table = made_card(tmp_path / f"table-{points}", points=points)
        page, outline = read(report(run_folder, table=table))
        assert "Mean error 6.1 % on networks that the predictor had not seen" in outline.text
        assert "counting MACs instead is off by 31.8 %" in outline.text
        assert "repeats a measurement to 4.3 %" in outline.text
        assert len(figures(page)) == (17 if points else 15)
        assert any(trace["type"] == kind for trace in figures(page)["figure-12"]["data"])
        older = "without the intervals of held-out networks and the residuals by kernel family"
        assert (older in outline.text) != points
        assert ("hwsearch fit --device x86-ort-1t adds them, from the table alone" in outline.text) != points
    for bad in ('{"unseen": {"mape": "low"}, "by_family": [], "points": [[1], 3]}', "[", '{"unseen": []}'):
        (table / "predictor/card.json").write_text(bad)
        (table / "predictor/manifest.json").write_text('{"log_errors": [1, "x", null]}')
        assert read(report(run_folder, table=table))[1].unbalanced == []


def test_the_card_is_found_by_the_devices_name(run_folder: Path, home: Path, made_card: Callable[..., Path]) -> None:
    made_card(home / "latency_tables" / "x86-ort-1t")
    assert "Mean error 6.1 %" in read(report(run_folder))[1].text
    change(run_folder / "summary.json", lambda s: s.update(device="../../../etc"))
    assert "No predictor card" in read(report(run_folder))[1].text


@pytest.mark.parametrize("metrics", [(1.0, 1.0), (1.0, 0.86), (0.4, 0.99)])
def test_no_tick_of_an_accuracy_lies_above_all(metrics: tuple[float, float]) -> None:
    rows = [
        Row(name, measured_ms=ms, metric=metric)
        for name, ms, metric in zip(("full", "found"), (2.0, 1.0), metrics, strict=True)
    ]
    figure = trained(rows, 1.1, "accuracy")
    assert figure is not None
    axis = figure["layout"]["yaxis"]
    ticks = axis["tickvals"]
    assert ticks[-1] == 1.0
    assert 2 <= len(ticks) <= 6
    assert axis["range"][0] <= ticks[0]
