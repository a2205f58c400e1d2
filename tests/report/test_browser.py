"""Reports in a real browser, on a wide and on a narrow screen: drawn whole, nothing asked for, nothing off the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hwsearch.report import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (1280, 400)
#: Put into a copy of the page: opens what can be opened, then tells the frame around it what does not fit.
PROBE = """
<script>
addEventListener("load", function () {
  document.querySelectorAll("details").forEach(function (d) { d.open = true; });
  setTimeout(function () {
    var wide = [], overlapping = [], small = [];
    document.querySelectorAll("body *").forEach(function (e) {
      var box = e.getBoundingClientRect();
      if (box.width && box.right > innerWidth + 1 && !e.closest("svg") && !e.closest(".scroll"))
        wide.push(e.tagName + "." + e.className);
      if (e.children.length === 0 && e.textContent.trim() && box.width && parseFloat(getComputedStyle(e).fontSize) < 11)
        small.push(e.textContent.trim().slice(0, 30));
    });
    document.querySelectorAll("svg.main-svg").forEach(function (svg) {
      var page = svg.getBoundingClientRect();
      ["xtick", "ytick"].forEach(function (axis) {
        var boxes = [];
        svg.querySelectorAll("." + axis + " > text").forEach(function (t) {
          var box = t.getBoundingClientRect();
          if (box.left < page.left - 2 || box.right > page.right + 2) wide.push("label " + t.textContent);
          if (!/rotate\\(-?[1-9]/.test(t.getAttribute("transform") || "")) boxes.push([box, t.textContent]);
        });
        boxes.forEach(function (one, at) {
          var next = boxes[at + 1];
          if (!next) return;
          var a = one[0], b = next[0];
          var across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
          var down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
          if (across > 1 && down > 4) overlapping.push(one[1] + " and " + next[1]);
        });
      });
    });
    parent.postMessage({
      width: innerWidth, scroll: document.documentElement.scrollWidth, wide: wide.slice(0, 9), small: small.slice(0, 9),
      overlapping: overlapping.slice(0, 9), drawn: document.documentElement.dataset.drawn,
      plots: document.querySelectorAll(".js-plotly-plot .main-svg").length,
    }, "*");
  }, 1500);
});
</script>
"""
FRAMES = """<!DOCTYPE html><title>frames</title><body style="margin:0"><pre id="told"></pre>%s
<script>
var told = [];
addEventListener("message", function (m) {
  told.push(m.data); document.getElementById("told").textContent = JSON.stringify(told);
});
</script>"""


def looked_at(page: Path, folder: Path) -> tuple[list[dict[str, Any]], str, list[str]]:
    """(what every width tells, the browser's log, the addresses it asked for)."""
    content = page.read_text(encoding="utf-8")
    before, _, after = content.rpartition("</body>")
    (folder / "copy.html").write_text(before + PROBE + "</body>" + after, encoding="utf-8")
    frames = "".join(
        f'<iframe src="copy.html" style="border:0;width:{width}px;height:900px"></iframe>' for width in WIDTHS
    )
    (folder / "frames.html").write_text(FRAMES % frames)
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    quiet += ["--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]
    quiet += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}"]
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", *quiet, "--virtual-time-budget=9000", "--dump-dom"]
    command += ["--window-size=1800,1000", (folder / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told, done.stdout[-2000:]
    net = (folder / "net.json").read_text(errors="replace") if (folder / "net.json").exists() else ""
    # an event a line; the browser's own errands have no origin
    asked = (
        re.search(r'"initiator":"(?!not an origin).*?"url":"((?:https?|wss?|ftp):[^"]*)"', e) for e in net.splitlines()
    )
    return json.loads(told[1]), done.stderr, sorted({found[1] for found in asked if found})


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("kind", ["run", "begun"])
def test_a_browser_draws_all_of_it_and_nothing_leaves_the_page(
    kind: str, run_folder: Path, tmp_path: Path, made_card: Callable[..., Path]
) -> None:
    table = made_card(tmp_path / "table", points=True) if kind == "run" else None
    if kind == "begun":
        for name in ("result.json", "summary.json", "explain.json", "space.json"):
            (run_folder / name).unlink()
    page = report(run_folder, tmp_path / "report.html", table=table)
    found = re.search(r'id="figures">(.*?)</script>', page.read_text(), re.DOTALL)
    figures = len(json.loads(found[1])) if found else 0
    told, log, asked = looked_at(page, tmp_path)
    assert sorted(entry["width"] for entry in told) == sorted(WIDTHS)
    for entry in told:
        assert entry["drawn"] == str(figures)
        assert entry["plots"] >= figures
        assert entry["scroll"] <= entry["width"], entry
        assert (entry["wide"], entry["overlapping"], entry["small"]) == ([], [], []), entry
    assert "CONSOLE" not in log, log[-2000:]
    assert asked == []


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt-get install chromium")
def test_the_look_finds_what_is_wrong(tmp_path: Path) -> None:
    """A page with one of every fault, so that the look above is known to see them."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<!DOCTYPE html><body><p style="width:700px">wide</p><p style="font-size:6px">small</p>'
        '<svg class="main-svg" width="200" height="50"><g class="xtick"><text x="9" y="20">one</text></g>'
        '<g class="xtick"><text x="14" y="20">two</text></g></svg>'
        '<img src="http://hwsearch.invalid/x.png"><script>console.error("an error")</script></body>'
    )
    told, log, asked = looked_at(page, tmp_path)
    narrow = next(entry for entry in told if entry["width"] == 400)
    assert narrow["scroll"] > 400
    assert narrow["wide"] == ["P."]
    assert narrow["small"] == ["small"]
    assert narrow["overlapping"] == ["one and two"]
    assert "CONSOLE" in log
    assert asked == ["http://hwsearch.invalid/x.png"]
