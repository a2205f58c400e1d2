"""Ten thousand layers: every verb that takes a model ends, with the right answer or a line that tells the limit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hard_case import ON_SIMULATED, SHAPE
from hard_onnx import chain, model, node, sums, weight
from running import told

MANY = "hard_nets:many"
TOO_DEEP = r"calls 10000 operations on 20000 parameters and buffers, and torch\.export takes .* above 6000"
CONFIG = """
[run]
name = "deep"
[device]
name = "simulated"
[profile]
minutes = 0.02
[model]
factory = "hard_nets:deep_classifier"
input = "1x1x28x28"
[data]
kind = "synthetic"
[search]
budget = "60%"
"""

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("estimate", (MANY, *SHAPE, *ON_SIMULATED)),
        ("estimate", (MANY, *SHAPE, *ON_SIMULATED, "--explain")),
        ("measure", (MANY, *SHAPE, *ON_SIMULATED)),
        ("space", (MANY, *SHAPE)),
        ("deploy", (MANY, *SHAPE, *ON_SIMULATED, "--output", "new")),
        ("profile", ("--model", MANY, *SHAPE, *ON_SIMULATED, "--minutes", "0.02")),
        ("run", ("deep.toml",)),
        ("search", ("deep.toml",)),
        ("space", ("--config", "deep.toml")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0] + "-" + value[-1],
)
def test_a_model_is_refused_with_the_limit(home: Path, verb: str, arguments: tuple[str, ...]) -> None:
    (home / "deep.toml").write_text(CONFIG)
    answer = told(verb, arguments)
    assert not answer.crash, answer.crash
    assert (answer.code, len(answer.lines), answer.out) == (2, 1, ""), answer.err[-2000:]
    wanted = TOO_DEEP if MANY in arguments else r"calls 10002 operations on 20002 .* above 6000"
    assert re.search(wanted, answer.lines[0]), answer.lines
    assert not (home / "new").exists()


@pytest.mark.parametrize(("net", "code", "says"), [("deep_norms", 0, "Folded"), ("many", 2, "nothing to fold")])
def test_a_model_is_folded_at_any_depth(home: Path, net: str, code: int, says: str) -> None:
    answer = told("fold", (f"hard_nets:{net}", *SHAPE))
    assert not answer.crash, answer.crash
    assert (answer.code, len(answer.lines)) == (code, code // 2), answer.err[-2000:]
    assert says in answer.out + answer.err


@pytest.mark.parametrize("graph", ["layers", "activations", "sums"])
def test_an_onnx_file_is_priced_explained_and_measured(home: Path, graph: str) -> None:
    layers = 10_000
    if graph == "layers":
        names = ["x", *(f"t{i}" for i in range(1, layers)), "y"]
        nodes = [node("Conv", [names[i], f"w{i}"], [names[i + 1]], kernel_shape=[1, 1]) for i in range(layers)]
        data = model(nodes=nodes, constants=[weight((4, 4, 1, 1), f"w{i}", 0.1 + i) for i in range(layers)])
    else:
        data = model(nodes=chain("Relu", layers) if graph == "activations" else sums(layers))
    (home / "deep.onnx").write_bytes(data)
    priced = told("estimate", ("deep.onnx", *ON_SIMULATED, "--json"))
    assert (priced.code, priced.crash) == (0, ""), priced.err[-2000:]
    facts = json.loads(priced.out)
    assert sum(kernel["family"] != "reorder" for kernel in facts["kernels"]) == layers
    assert facts["memory"]["peak_activation_bytes"] == 2 * 4 * 8 * 8 * 4, "two buffers take turns"
    table = told("estimate", ("deep.onnx", *ON_SIMULATED, "--explain"))
    assert (table.code, table.crash) == (0, ""), table.err[-2000:]
    assert "Why it is not faster" in table.out
    assert len(table.out.splitlines()) < 600
    timed = told("measure", ("deep.onnx", *ON_SIMULATED))
    assert (timed.code, timed.crash) == (0, ""), timed.err[-2000:]
    assert "measured_ms" in timed.out
