"""ONNX files and model folders that are damaged, or made to harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hard_case import (
    DEEP,
    DIGITS,
    NOT_UTF8,
    ON_SIMULATED,
    Case,
    Spoil,
    both,
    cut,
    field,
    folder_instead,
    gone,
    link,
    without,
    write,
)  # fmt: skip
from hard_onnx import chain, hollow, integers, model, nested, node, noise, onnx_file, outside, pickled, sums, weight

_FILE = ("bad.onnx", *ON_SIMULATED)
_USABLE = "bad.onnx is not a usable ONNX file: .*; export the model again"
_DAMAGED = r"(damaged|no ONNX|not a usable)"


def _after(change: Any) -> Spoil:
    """The good file after ``change`` of its bytes."""

    def spoil(home: Path) -> None:
        (home / "bad.onnx").write_bytes(change((home / "net.onnx").read_bytes()))

    return spoil


def _recursive_function(proto: Any) -> None:
    from onnx import helper

    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    proto.functions.append(
        helper.make_function("own", "F", ["a"], ["b"], [helper.make_node("F", ["a"], ["b"], domain="own")], opsets)
    )
    proto.opset_import.append(opsets[1])
    del proto.graph.node[:]
    proto.graph.node.append(helper.make_node("F", ["x"], ["y"], domain="own"))


#: Files that are refused before a device is asked.
_FILES: tuple[tuple[str, Spoil, str], ...] = (
    ("empty", write("bad.onnx", b""), _USABLE), ("text", write("bad.onnx", "not a model"), _USABLE),
    ("a page", write("bad.onnx", "<html>404</html>"), _USABLE), ("JSON", write("bad.onnx", "{}"), _USABLE),
    ("a tenth of it", _after(lambda data: data[: len(data) // 10]), _USABLE),
    ("half of it", _after(lambda data: data[: len(data) // 2]), _USABLE),
    ("all but its last byte", _after(lambda data: data[:-1]), _USABLE),
    ("with rubbish behind", _after(lambda data: data + noise(64, 1)), _USABLE),
    *((f"random bytes {seed}", onnx_file(lambda seed=seed: noise(4096, seed)), _USABLE) for seed in range(3)),
    ("zeros", write("bad.onnx", b"\0" * 4096), _USABLE),
    ("a pickle", lambda home: (pickled(home), (home / "evil.pt").rename(home / "bad.onnx")), _USABLE),
    ("a folder", folder_instead("bad.onnx"), "cannot read the model bad.onnx"),
    ("a link to itself", link("bad.onnx", "bad.onnx"), "cannot read the model bad.onnx"),
    ("a link to nothing", link("bad.onnx", "nowhere"), "cannot read the model bad.onnx"),
    ("no graph", onnx_file(lambda: model(change=lambda p: p.ClearField("graph"))), _USABLE),
    ("no version", onnx_file(lambda: model(change=lambda p: p.ClearField("ir_version"))), _USABLE),
    ("a version to come", onnx_file(lambda: model(ir=999)), _USABLE),
    ("no operators", onnx_file(lambda: model(change=lambda p: p.ClearField("opset_import"))), _USABLE),
    ("an unknown operator", onnx_file(lambda: model(nodes=[node("Frobnicate", ["x"], ["y"])])), _USABLE),
    ("a circle", onnx_file(lambda: model(nodes=[node("Relu", ["b"], ["a"]), node("Relu", ["a"], ["b"]),
                                               node("Relu", ["x"], ["y"])])), _USABLE),
    ("a circle of identities", onnx_file(lambda: model(nodes=[node("Identity", ["y"], ["a"]),
                                                             node("Identity", ["a"], ["y"])])), _USABLE),
    ("a tensor that nobody makes", onnx_file(lambda: model(nodes=[node("Relu", ["z"], ["y"])])), _USABLE),
    ("a tensor made twice", onnx_file(lambda: model(nodes=[node("Relu", ["x"], ["y"]), node("Tanh", ["x"], ["y"])])),
     _USABLE),
    ("a convolution without weights", onnx_file(lambda: model(nodes=[node("Conv", ["x"], ["y"])])), _USABLE),
    ("strides that are words", onnx_file(lambda: model(nodes=[node("Conv", ["x", "w"], ["y"], strides=["a"])])),
     _USABLE),
    ("an attribute that is none", onnx_file(lambda: model(nodes=[node("Relu", ["x"], ["y"], magic=3)])), _USABLE),
    ("a function that calls itself", onnx_file(lambda: model(change=_recursive_function)), "bad.onnx"),
    ("weights of a huge shape", onnx_file(lambda: model(constants=[hollow([1 << 40, 1 << 40])])), "bad.onnx"),
    ("weights of a shape below 0", onnx_file(lambda: model(constants=[hollow([-4, 4, 3, 3])])), "bad.onnx"),
    ("weights without data", onnx_file(lambda: model(constants=[hollow([4, 4, 3, 3])])), "bad.onnx"),
    ("weights outside, gone", onnx_file(lambda: model(constants=[outside("w.bin")])), "bad.onnx"),
    ("weights in a folder above", onnx_file(lambda: model(constants=[outside("../../../etc/passwd")])), "bad.onnx"),
    ("weights at a place of the system", onnx_file(lambda: model(constants=[outside("/etc/passwd")])), "bad.onnx"),
    ("weights at no place", onnx_file(lambda: model(constants=[outside("")])), "bad.onnx"),
    ("weights in itself", onnx_file(lambda: model(constants=[outside("bad.onnx")])), "bad.onnx"),
    ("weights behind a link",
     both(onnx_file(lambda: model(constants=[outside("w.bin")])), link("w.bin", "/etc/passwd")), "bad.onnx"),
    ("an open size", onnx_file(lambda: model(shape=["N", 4, 8, 8])), "has a dynamic size .*: add --input 1x4x8x8"),
    ("a size of 0", onnx_file(lambda: model(shape=[1, 0, 8, 8])), "dynamic size|bad.onnx"),
    ("a size below 0", onnx_file(lambda: model(shape=[1, -4, 8, 8])), "dynamic size|bad.onnx"),
)  # fmt: skip
#: Files whose graph is ONNX, and which no runtime could run: told by whoever reads the nodes.
_GRAPHS: tuple[tuple[str, Spoil, str], ...] = (
    ("no nodes", onnx_file(lambda: model(nodes=[], out="x")), "holds no node"),
    ("a stride of 0", onnx_file(lambda: model(nodes=[node("Conv", ["x", "w"], ["y"], strides=[0, 0])])), _DAMAGED),
    ("an axis that is not there", onnx_file(lambda: model(nodes=[node("Concat", ["x", "x"], ["y"], axis=9)])),
     _DAMAGED),
    ("a window of one side", onnx_file(lambda: model(nodes=[node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2],
                                                                strides=[1])])), _DAMAGED),
    ("a node of a runtime without inputs",
     onnx_file(lambda: model(nodes=[node("Conv", [], ["y"], domain="com.microsoft.nchwc")], change=_microsoft)),
         _DAMAGED),
    ("an unfolded block", onnx_file(lambda: model(
        nodes=[node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]), node("Conv", ["x", "v"], ["b"]),
               node("Add", ["a", "b"], ["y"])],
        constants=[weight(), weight((4, 4, 1, 1), "v")])), "holds a block of branches .*fold it first"),
)  # fmt: skip


def _microsoft(proto: Any) -> None:
    from onnx import helper

    proto.opset_import.append(helper.make_opsetid("com.microsoft.nchwc", 1))


_JSON, _WEIGHTS = Path("model/model.json"), Path("model/weights.safetensors")


def _signed(change: Any) -> Spoil:
    """The weights after ``change`` of their bytes, with a checksum that agrees."""

    def spoil(home: Path) -> None:
        import hashlib

        data = change((home / _WEIGHTS).read_bytes())
        (home / _WEIGHTS).write_bytes(data)
        field(_JSON, "weights_sha256", value=hashlib.sha256(data).hexdigest())(home)

    return spoil


def _pickle(home: Path) -> bytes:
    pickled(home)
    return (home / "evil.pt").read_bytes()


def _evil_weights(home: Path) -> None:
    data = _pickle(home)
    (home / "evil.pt").unlink()
    _signed(lambda _: data)(home)


def _other_weights(home: Path) -> None:
    from safetensors.torch import load, save

    def change(data: bytes) -> bytes:
        tensors = load(data)
        tensors["more"] = next(iter(tensors.values())).clone()
        return bytes(save(tensors))

    _signed(change)(home)


#: What ``model.json`` says, and what is said of it.
_FOLDERS: tuple[tuple[str, Spoil, str], ...] = (
    ("empty", write(_JSON, ""), "model.json is not JSON"), ("torn", cut(_JSON, 0.5), "is not JSON"),
    ("not UTF-8", write(_JSON, NOT_UTF8), "is not JSON|not a model desc"), ("brackets", write(_JSON, DEEP),
     "is not JSON"),
    ("digits", write(_JSON, DIGITS), "is not JSON"), ("a list", write(_JSON, "[]"), "is not a model description"),
    ("a folder", folder_instead(_JSON), "holds no model.json"), ("gone", gone(_JSON), "holds no model.json"),
    ("another schema", field(_JSON, "schema", value=3), "is not a model description"),
    ("another version", field(_JSON, "version", value=2), "has version 2"),
    ("a field gone", without(_JSON, "output_shape"), "field output_shape"),
    ("a field more", field(_JSON, "run", value="x"), "field run"),
    ("widths that are a list", field(_JSON, "widths", value=[]), "field widths"),
    ("a shape of words", field(_JSON, "input_shape", value=["a"]), "field input_shape"),
    ("a shape of nothing", field(_JSON, "input_shape", value=[]), "shape|input"),
    ("a shape below 0", field(_JSON, "input_shape", value=[1, -1, 16, 16]), "shape"),
    ("an endless shape", field(_JSON, "input_shape", value=[99999, 99999, 99, 99]), "the input shape"),
    ("a shape of many axes", field(_JSON, "input_shape", value=[1] * 5000), "the input shape .*axes"),
    ("another output", field(_JSON, "output_shape", value=[1, 3]), "returns .*, not"),
    ("code of the system", field(_JSON, "factory", value="os:system"), "wants to run 'os:system'"),
    ("code of a stranger", field(_JSON, "factory", value="hard_nets:leaves"), "--allow-factory hard_nets:leaves"),
    ("a loader as factory", field(_JSON, "factory", value="hwsearch.models.loading:load_factory"), "not a reference"),
    ("a factory with dots", field(_JSON, "factory", value="hwsearch.models.vgg.x:vgg_small"), "which is not a refer"),
    ("a factory that is none", field(_JSON, "factory", value="hwsearch.models.vgg:nothing"), "not a reference model"),
    ("a module that is none", field(_JSON, "factory", value="hwsearch.models.nothing:x"), "does not have"),
    ("no factory", field(_JSON, "factory", value=None), "names no factory"),
    ("unknown arguments", field(_JSON, "factory_kwargs", value={"nonsense": 1}), "fails: TypeError"),
    ("a width of nothing", field(_JSON, "factory_kwargs", "width", value=0), "above 0"),
    ("a width that is endless", field(_JSON, "factory_kwargs", "width", value=1e30), "fails|memory"),
    ("a width in words", field(_JSON, "factory_kwargs", "width", value="wide"), "fails"),
    ("another checksum", field(_JSON, "weights_sha256", value="0" * 64), "checksum"),
    ("weights gone", gone(_WEIGHTS), "cannot read"), ("weights cut", cut(_WEIGHTS, 0.9), "checksum"),
    ("weights a folder", folder_instead(_WEIGHTS), "cannot read"),
    ("weights cut and signed", _signed(lambda data: data[:-100]), "is not a safetensors file"),
    ("weights of zeros", _signed(lambda data: b"\0" * len(data)), "is not a safetensors file"),
    ("weights with an endless header", _signed(lambda data: b"\xff" * 8 + data), "is not a safetensors file"),
    ("weights that are a pickle", _evil_weights, "is not a safetensors file"),
    ("weights of another model", _other_weights, "has an unknown tensor 'more'"),
    ("full weights for a narrow model", field(_JSON, "factory_kwargs", "width", value=0.125), "does not fit"),
)  # fmt: skip


CASES: tuple[Case, ...] = (
    *(Case("estimate", f"ONNX: {name}", _FILE, says, spoil=spoil) for name, spoil, says in _FILES),
    *(Case("measure", f"ONNX: {name}", _FILE, says, spoil=spoil) for name, spoil, says in _FILES[::3]),
    *(
        Case(verb, f"graph: {name}", _FILE, says, spoil=spoil)
        for verb in ("estimate", "measure")
        for name, spoil, says in _GRAPHS
    ),
    Case("estimate", "ONNX: half a shape", (*_FILE, "--input", "1x4"), "takes 4 axes",
         spoil=onnx_file(lambda: model(shape=["N", 4, "H", "W"]))),
    Case("estimate", "ONNX: a shape that does not run", (*_FILE, "--input", "1x4x2x2"), "does not run on the shape",
         spoil=onnx_file(lambda: model(shape=["N", 4, "H", "W"]))),
    Case("estimate", "ONNX: other channels", (*_FILE, "--input", "1x3x8x8"), "takes 4 channels and would get 3",
         spoil=onnx_file(lambda: model(shape=["N", "C", 8, 8]))),
    *(Case("estimate", f"model folder: {name}", ("model", *ON_SIMULATED), says, spoil=s) for name, s, says in _FOLDERS),
    *(
        Case(verb, f"model folder: {name}", ("model", *rest), says, spoil=spoil)
        for verb, rest in (("fold", ()), ("space", ()), ("deploy", (*ON_SIMULATED, "--output", "new")))
        for name, spoil, says in _FOLDERS[4::9]
    ),
    Case("measure", "another shape than the folder's", ("model", *ON_SIMULATED, "--input", "1x1x8x8"),
        "takes 1x1x16x16"),
    Case("run", "weights that are a pickle", ("bad.toml",), "evil.pt is no safetensors file",
         spoil=both(pickled, lambda home: (home / "bad.toml").write_text(
             (home / "good.toml").read_text().replace("[data]", 'weights = "evil.pt"\n[data]')))),
    # what is odd, but works
    Case("estimate", "a network of no layer works", ("hard_nets:empty", "--input", "1x1x8x8", *ON_SIMULATED),
         "predicted .* ms", code=0, result=True),
    Case("measure", "a network of no layer works", ("hard_nets:empty", "--input", "1x1x8x8", *ON_SIMULATED),
         "measured_ms", code=0, result=True),
    Case("measure", "a model that prints keeps its JSON", ("hard_nets:loud", "--input", "1x1x8x8", *ON_SIMULATED,
        "--json"),
         r"\A\{.*\}\n\Z", code=0, result=True),
    Case("estimate", "ONNX: a thousand sums work", _FILE, "predicted", code=0, result=True,
         spoil=onnx_file(lambda: model(nodes=sums(1200)))),
    Case("estimate", "ONNX: a thousand layers work", _FILE, "predicted", code=0, result=True,
         spoil=onnx_file(lambda: model(nodes=chain("Relu", 1000)))),
    Case("estimate", "ONNX: branches in branches work", _FILE, "predicted|damaged", code=0, result=True,
         spoil=onnx_file(lambda: model(nodes=nested(3)))),
    Case("estimate", "ONNX: a reshape by numbers works", _FILE, "predicted", code=0, result=True,
         spoil=onnx_file(lambda: model(rank=2, nodes=[node("Reshape", ["x", "s"], ["y"])], constants=[integers([1, -1],
             "s")]))),
)  # fmt: skip
