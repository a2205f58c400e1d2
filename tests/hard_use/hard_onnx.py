"""ONNX files that break one rule each; built when a case asks for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hard_case import Spoil


def onnx_file(make: Callable[[], bytes], path: str = "bad.onnx") -> Spoil:
    """A file with what ``make`` gives."""
    return lambda home: (home / path).write_bytes(make())


def model(
    *,
    nodes: list[Any] | None = None,
    shape: list[Any] | None = None,
    kind: int = 1,
    constants: list[Any] | None = None,
    out: str = "y",
    rank: int = 4,
    opset: int = 17,
    ir: int = 8,
    change: Callable[[Any], object] | None = None,
) -> bytes:
    """``x`` (1, 4, 8, 8), a convolution unless other nodes are given, ``y``; ``change`` has the last word."""
    from onnx import TensorProto, helper

    inputs = [helper.make_tensor_value_info("x", kind, [1, 4, 8, 8] if shape is None else shape)]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=[3, 3])] if nodes is None else nodes,
        "g",
        inputs,
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, [None] * rank)],
        initializer=[weight()] if constants is None else constants,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    if change is not None:
        change(proto)
    return proto.SerializeToString()


def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(op, inputs, outputs, **attributes)


def weight(shape: tuple[int, ...] = (4, 4, 3, 3), name: str = "w", value: float = 0.1) -> Any:
    import numpy as np
    from onnx import numpy_helper

    return numpy_helper.from_array(np.full(shape, value, np.float32), name)


def integers(values: list[int], name: str) -> Any:
    import numpy as np
    from onnx import numpy_helper

    return numpy_helper.from_array(np.array(values, np.int64), name)


def hollow(dims: list[int], name: str = "w", data: bytes = b"") -> Any:
    """A tensor that claims a shape and has other data."""
    from onnx import TensorProto

    return TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, raw_data=data)


def outside(location: str, name: str = "w") -> Any:
    """A tensor whose data lie in another file."""
    from onnx import TensorProto

    found = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4, 4, 3, 3])
    found.data_location = TensorProto.EXTERNAL
    entry = found.external_data.add()
    entry.key, entry.value = "location", location
    return found


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def chain(op: str, count: int, **attributes: Any) -> list[Any]:
    """So many nodes one after the other, from x to y."""
    names = ["x", *(f"t{i}" for i in range(1, count)), "y"]
    return [node(op, [names[i]], [names[i + 1]], **attributes) for i in range(count)]


def sums(count: int) -> list[Any]:
    """x + x + x ...: every sum goes into the next one."""
    names = ["x", *(f"t{i}" for i in range(1, count)), "y"]
    return [node("Add", [names[i], "x"], [names[i + 1]]) for i in range(count)]


def nested(depth: int) -> list[Any]:
    """Branches inside branches."""
    from onnx import TensorProto, helper

    def body(level: int) -> Any:
        inner = [node("Relu", ["x"], [f"r{level}"])] if level == 0 else [branch(level - 1)]
        return helper.make_graph(
            inner, f"g{level}", [], [helper.make_tensor_value_info(f"r{level}", TensorProto.FLOAT, [None] * 4)]
        )

    def branch(level: int) -> Any:
        return node("If", ["c"], [f"r{level + 1}"], then_branch=body(level), else_branch=body(level))

    import numpy as np
    from onnx import numpy_helper

    condition = node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True), "c"))
    return [condition, branch(depth), node("Identity", [f"r{depth + 1}"], ["y"])]


def pickled(home: Path) -> None:
    """``evil.pt``: whoever unpickles it makes the file ``pwned``."""
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(home / "pwned"), "w")

    (home / "evil.pt").write_bytes(pickle.dumps(Evil()))
