"""The look of a report: one style sheet and the few lines of script that draw its figures. No fonts, no network."""

from __future__ import annotations

#: Colours of the three networks that a run compares, and of states; readable with the common colour blindnesses.
FOUND, UNIFORM, FULL = "#0b62c4", "#c2700a", "#8b96a8"
PASS, CONDITIONAL, FAIL = "#12805c", "#a15c00", "#b3261e"
INK, MUTED, GRID = "#17202e", "#5d6a7e", "#e9ecf1"
FAMILY_COLOURS = {
    "conv": "#0b62c4",
    "conv_first": "#6aa9ea",
    "pointwise": "#0f8f7b",
    "depthwise": "#7a55c7",
    "grouped": "#b394ea",
    "conv_transpose": "#24407a",
    "gemm": "#c2700a",
    "pool": "#7b8f2a",
    "global_pool": "#b3c062",
    "elementwise": "#cc4b74",
    "reorder": "#e0a526",
    "concat": "#9a6b4f",
    "move": "#c9a892",
    "free": "#c6ccd6",
    "other": "#8b96a8",
}
#: What a layer's time is spent on.
BOUND_COLOURS = {"compute": "#0b62c4", "memory": "#e0a526", "overhead": "#8b96a8"}

CSS = """
:root { --ink: #17202e; --muted: #5d6a7e; --line: #e1e5ec; --page: #f5f6f8; --panel: #fff; --accent: #0b62c4;
  --pass: #12805c; --conditional: #a15c00; --fail: #b3261e; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Liberation Sans", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
.wrap { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
.top { background: var(--panel); border-bottom: 1px solid var(--line); }
.top .wrap { display: flex; flex-wrap: wrap; gap: 4px 20px; align-items: baseline; padding-top: 14px;
  padding-bottom: 14px; }
.brand { font-weight: 700; letter-spacing: -.01em; margin: 0; }
.brand b { color: var(--accent); font-weight: 700; }
.meta { margin: 0; color: var(--muted); font-size: 14px; overflow-wrap: anywhere; }
.meta span + span::before { content: "·"; margin: 0 8px; color: #b3bac6; }
.hero { padding: 40px 0 28px; }
h1 { font-size: 34px; line-height: 1.18; letter-spacing: -.022em; margin: 14px 0 8px; font-weight: 650;
  max-width: 26em;
  text-wrap: balance; overflow-wrap: anywhere; }
.lead { font-size: 18px; color: var(--muted); margin: 0; max-width: 50em; text-wrap: pretty; }
.pill { display: inline-block; padding: 3px 12px; border-radius: 999px; font-size: 13px; font-weight: 650;
  letter-spacing: .04em; text-transform: uppercase; color: #fff; background: #6b778b; }
.pill.pass { background: var(--pass); } .pill.conditional { background: var(--conditional);
  } .pill.fail { background: var(--fail); }
.reasons { margin: 14px 0 0; padding: 0; list-style: none; max-width: 60em; }
.reasons li { border-left: 3px solid var(--line); padding: 2px 0 2px 12px; margin: 6px 0; color: var(--muted);
  font-size: 15px;
  overflow-wrap: anywhere; }
.reasons li.bad { border-color: var(--fail); color: var(--ink); }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin-bottom: 14px; }
.card, .panel { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 16px 18px 15px; border-top: 3px solid var(--line); min-width: 0; }
.card.pass { border-top-color: var(--pass); } .card.conditional { border-top-color: var(--conditional); }
.card.fail { border-top-color: var(--fail); } .card.accent { border-top-color: var(--accent); }
.card h2 { font-size: 13px; font-weight: 600; color: var(--muted); margin: 0; }
.card .value { font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -.02em; margin: 4px 0 2px;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.card .value small { font-size: 17px; font-weight: 500; color: var(--muted); letter-spacing: 0; margin-left: 4px; }
.card .sub { margin: 0; font-size: 14px; color: var(--muted); line-height: 1.4; overflow-wrap: anywhere; }
.panel { padding: 22px 24px 20px; margin: 0 0 14px; min-width: 0; }
.panel > h2 { font-size: 19px; letter-spacing: -.01em; margin: 0 0 2px; }
.panel > .note { margin: 0 0 14px; color: var(--muted); font-size: 15px; max-width: 60em; overflow-wrap: anywhere;
  text-wrap: pretty; }
.absent { color: var(--muted); margin: 6px 0 2px; font-size: 15px; }
.split { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
.split > .panel { margin-bottom: 14px; }
.halves { display: grid; grid-template-columns: 1fr 1fr; gap: 24px; margin-top: 18px; } .halves > div { min-width: 0; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--muted); font-size: 13px; padding: 6px 10px;
  border-bottom: 1px solid var(--line);
  vertical-align: bottom; }
td { text-align: right; padding: 9px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:last-child, th:last-child { padding-right: 0; }
tr:last-child td { border-bottom: 0; }
td:first-child { white-space: normal; overflow-wrap: anywhere; }
tr.found td { font-weight: 650; }
tr.found td:first-child { color: var(--accent); }
td .minor { display: block; font-size: 13px; font-weight: 400; color: var(--muted); }
.over { color: var(--fail); }
.race { position: relative; margin: 4px 0 22px; padding-top: 24px; }
.race .row { display: grid; grid-template-columns: 110px 1fr 84px; align-items: center; gap: 12px; height: 36px;
  font-size: 15px; }
.race .row > .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.race .row > .ms { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.race .track { position: relative; height: 100%; }
.race .bar { position: absolute; top: 9px; bottom: 9px; left: 0; border-radius: 3px; background: #8b96a8;
  min-width: 2px; }
.race .bar.found { background: var(--accent); } .race .bar.uniform { background: #c2700a; }
.race .bar.guess { opacity: .35; }
.race .whisker { position: absolute; top: 17px; height: 2px; background: var(--ink); opacity: .55; }
.race .tick { position: absolute; top: 11px; bottom: 11px; width: 2px; background: var(--ink); }
.race .budget { position: absolute; top: 20px; bottom: -4px; width: 0; border-left: 2px dashed var(--ink); }
.race .overlay { position: absolute; top: 0; bottom: 0; left: 122px; right: 96px; pointer-events: none; }
.race .budget-label { position: absolute; top: 0; font-size: 13px; font-weight: 600; white-space: nowrap;
  transform: translateX(-50%); }
.race .found .name { font-weight: 650; color: var(--accent); } .race .found .ms { font-weight: 650; }
.key { font-size: 13px; color: var(--muted); margin: -10px 0 16px; }
.figure { width: 100%; }
details { margin-top: 10px; font-size: 15px; }
summary { cursor: pointer; color: var(--muted); font-size: 14px; }
details .scroll { max-height: 360px; overflow: auto; margin-top: 8px; }
dl { display: grid; grid-template-columns: minmax(120px, max-content) 1fr; gap: 6px 22px; margin: 8px 0 0;
  font-size: 15px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
td code { white-space: normal; overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: 14px; padding: 14px 0 48px; }
@media (max-width: 900px) {
  .cards { grid-template-columns: 1fr 1fr; }
  .split, .halves { grid-template-columns: 1fr; gap: 0; }
}
@media (max-width: 640px) {
  .wrap { padding: 0 14px; }
  .hero { padding: 24px 0 20px; } h1 { font-size: 25px; } .lead { font-size: 16px; }
  .cards { gap: 10px; } .card { padding: 12px 13px; } .card .value { font-size: 23px;
    } .card .value small { font-size: 14px; }
  .card .sub { font-size: 13px; }
  .panel { padding: 16px 14px 14px; }
  .race .row { grid-template-columns: 64px 1fr 66px; gap: 8px; font-size: 14px; } .race .overlay { left: 72px;
    right: 74px; }
  table.stack thead { display: none; }
  table.stack tr { display: grid; grid-template-columns: 1fr 1fr; gap: 0 16px; padding: 10px 0;
    border-bottom: 1px solid var(--line); }
  table.stack tr:last-child { border-bottom: 0; }
  table.stack td { border: 0; padding: 2px 0; display: flex; justify-content: space-between; gap: 8px;
    align-items: baseline; }
  table.stack td:first-child { grid-column: 1 / -1; font-weight: 650; }
  table.stack td[data-label]::before { content: attr(data-label); color: var(--muted); font-weight: 400;
    font-size: 13px; }
  td .minor { display: none; }
  dl { grid-template-columns: 104px 1fr; gap: 5px 12px; font-size: 14px; }
}
@media print { body { background: #fff; } .panel, .card { break-inside: avoid; } }
"""

SCRIPT = """
(function () {
  var figures = JSON.parse(document.getElementById("figures").textContent);
  var small = window.matchMedia("(max-width: 640px)");
  function merged(base, patch) {
    var result = Array.isArray(base) ? base.slice() : Object.assign({}, base);
    Object.keys(patch || {}).forEach(function (key) {
      var both = result[key] && typeof result[key] === "object" && patch[key] && typeof patch[key] === "object";
      result[key] = both && !Array.isArray(patch[key]) ? merged(result[key], patch[key]) : patch[key];
    });
    return result;
  }
  function draw() {
    Object.keys(figures).forEach(function (id) {
      var figure = figures[id], narrow = small.matches, place = document.getElementById(id);
      place.style.height = (narrow ? figure.narrow_height : figure.height) + "px";
      var layout = narrow ? merged(merged(figure.layout, { dragmode: false }), figure.narrow) : figure.layout;
      Plotly.react(place, figure.data, layout, { displaylogo: false, responsive: true, displayModeBar: false });
    });
  }
  draw();
  small.addEventListener("change", draw);
  document.documentElement.setAttribute("data-drawn", Object.keys(figures).length);
})();
"""
