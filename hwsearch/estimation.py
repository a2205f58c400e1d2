"""``estimate``: a model's predicted milliseconds on a device, and on demand why they are what they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hwsearch.console import Console
from hwsearch.errors import InputError, UnsupportedModelError
from hwsearch.model_argument import ModelArgument

if TYPE_CHECKING:
    from hwsearch.device.session import DeviceSession
    from hwsearch.device.spec import Device
    from hwsearch.graph.kernel import Kernel
    from hwsearch.graph.onnx_build import OnnxTemplate
    from hwsearch.graph.widths import WidthChoice
    from hwsearch.latency.explain import Explanation, LayerCost
    from hwsearch.latency.memory import Memory
    from hwsearch.latency.predictor import LatencyPredictor, NetworkEstimate

Told = Callable[[int, int, str], None]

#: Rows of a table that a person would still read.
_MOST_ROWS = 250
#: For stair edges the runtime lowers a thousand networks or so of the width space: minutes, where it has more groups.
_MOST_GROUPS = 250


@dataclass(frozen=True)
class Estimate:
    """A model's prediction: the kernels that the device makes of it, their milliseconds, and why."""

    model: str
    device: str
    kernels: tuple[Kernel, ...]
    found: NetworkEstimate
    memory: Memory
    explanation: Explanation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        facts: dict[str, Any] = {
            "model": self.model,
            "device": self.device,
            "predicted_ms": self.found.ms,
            "low_ms": self.found.low_ms,
            "high_ms": self.found.high_ms,
            "p90_ms": self.found.p90_ms,
            "coverage": self.found.coverage,
            "unknown": list(self.found.unknown),
            "memory": {**asdict(self.memory), "total_bytes": self.memory.total_bytes},
            "kernels": [
                {"node": _node(kernel), "family": kernel.family, "ms": ms}
                for kernel, ms in zip(self.kernels, self.found.kernel_ms, strict=True)
            ],
        }
        return facts if self.explanation is None else {**facts, "explanation": self.explanation.to_dict()}

    def show(self, console: Console) -> None:
        """As tables and lines of text."""
        found, title = self.found, f"{self.model} on {self.device}"
        if self.explanation is not None:
            show_explanation(console, title, self.explanation)
        else:
            total = sum(found.kernel_ms)
            rows = [
                [_node(k), k.family, f"{ms:.4g}", f"{100 * ms / total:.1f}"]
                for k, ms in zip(self.kernels, found.kernel_ms, strict=True)
            ]
            _show_rows(console, title, ["kernel", "family", "ms", "% of all"], rows, found.kernel_ms)
        for line in found.unknown[:_MOST_ROWS]:
            console.show(f"guessed: {line}")
        if len(found.unknown) > _MOST_ROWS:
            console.show(f"guessed: {len(found.unknown) - _MOST_ROWS} more; --json lists all")
        console.show(
            f"predicted {found.ms:.4g} ms (90 % interval {found.low_ms:.4g} to {found.high_ms:.4g}), "
            f"single runs within {found.p90_ms:.4g} ms in 90 %, coverage {100 * found.coverage:.1f} %"
        )
        memory = self.memory
        parts = (memory.total_bytes, memory.peak_activation_bytes, memory.input_bytes, memory.weight_bytes)
        whole, activations, inputs, weights = (f"{size / 2**20:.3g}" for size in parts)
        console.show(
            f"peak memory {whole} MiB: activations {activations} (most at {memory.node}), input {inputs}, "
            f"weights {weights}"
        )


def network_of(
    argument: ModelArgument, device: Device, *, allow_unfolded: bool = False, tell: Callable[[str], None] | None = None
) -> bytes:
    """The network that a device would run for a model: folded, and in 8 bits on an ``int8`` device.

    A PyTorch model is folded here; an ONNX file cannot be, and is refused where it holds blocks of branches. A float
    network becomes an 8-bit one without calibration: the same kernels, so the same milliseconds.

    Args:
        allow_unfolded: take the model as it stands, neither folded nor refused.
        tell: told in a line what was done to the model.
    Raises:
        InputError: an ONNX file that is unfolded.
        UnsupportedModelError: the model cannot be exported.
    """
    from hwsearch.latency.quantising import is_quantised, quantise_network
    from hwsearch.latency.unfolded import refuse_unfolded

    say = tell or (lambda text: None)
    onnx = argument.to_onnx(unfolded=allow_unfolded)
    if not allow_unfolded:
        left = refuse_unfolded(onnx, argument.spec).norms
        if argument.module is not None:
            say(_folded(argument))
        elif left:
            say(
                f"{argument.spec} holds {len(left)} batch norms behind convolutions (the first: {left[0]}): the "
                "runtime may fold them when it loads the file; `hwsearch fold` does it for certain"
            )
    if device.precision == "int8" and not is_quantised(onnx):
        say(f"{device.name} is an int8 device: {argument.spec} is looked at in 8 bits (quantised without calibration)")
        onnx = quantise_network(onnx)
    return onnx


def _folded(argument: ModelArgument) -> str:
    """What folding a module does, in a line."""
    from hwsearch.reparam.fold import plan_fold

    plan = plan_fold(argument.need_module(), argument.example_input)
    if not plan.blocks and not plan.pairs:
        return f"{argument.spec} has nothing to fold"
    counted = ((len(plan.blocks), "block", " of branches"), (len(plan.pairs), "batch norm", ""))
    done = [f"{count} {noun}{'s' * (count != 1)}{rest}" for count, noun, rest in counted if count]
    stay = f"; {len(plan.left)} stay (the first: {plan.left[0][0]}, {plan.left[0][1]})" if plan.left else ""
    return f"{argument.spec} is folded first: {', '.join(done)}{stay}"


def pricer(
    device: Device, session: DeviceSession, predictor: LatencyPredictor | None, reference_ms: float | None
) -> Callable[[bytes], tuple[float | None, float | None]]:
    """(predicted, measured) milliseconds of a network that is deployed: predicted where there is a predictor, measured
    where there is a reference speed."""
    from hwsearch.latency.measure import measure
    from hwsearch.latency.predictor import OutOfRangeWarning

    def price(onnx: bytes) -> tuple[float | None, float | None]:
        predicted = measured = None
        if predictor is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OutOfRangeWarning)
                predicted = predictor.network(session.lower([onnx])[0]).ms
        if reference_ms is not None:
            measured = measure(onnx, session, reference_ms=reference_ms, allow_unfolded=True).measured_ms
        return predicted, measured

    return price


def estimate(
    argument: ModelArgument,
    device: Device,
    session: DeviceSession,
    predictor: LatencyPredictor,
    *,
    why: bool = False,
    told: Told | None = None,
    allow_unfolded: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Estimate:
    """Predict a model's milliseconds; with ``why`` also explain them. See ``network_of`` for what is looked at.

    Raises:
        InputError: an ONNX file that is unfolded.
        UnsupportedModelError: the model cannot be exported.
        DeviceJobError: the runtime rejects it.
    """
    from hwsearch.latency.memory import peak_memory
    from hwsearch.latency.predictor import OutOfRangeWarning

    onnx = network_of(argument, device, allow_unfolded=allow_unfolded, tell=tell)
    # the runtime is asked once: a large network takes it half a second, and its graph is wanted for the memory too
    optimised = session.optimise([onnx], [argument.spec])[0]
    kernels = session.parse(optimised)
    with warnings.catch_warnings():
        # What is guessed is listed with the result.
        warnings.simplefilter("ignore", OutOfRangeWarning)
        found = predictor.network(kernels)
        note = "no stair edges: the model is looked at as it stands, unfolded" if allow_unfolded else ""
        explanation = explain_model(argument, onnx, kernels, session, predictor, told, note) if why else None
    # Only ONNX Runtime's own graph is an ONNX file; of the others' buffers the network as it stands gives an idea.
    memory = peak_memory(optimised if device.runtime == "onnxruntime" else onnx)
    return Estimate(argument.spec, device.name, kernels, found, memory, explanation)


def explain_model(
    argument: ModelArgument,
    onnx: bytes,
    kernels: tuple[Kernel, ...],
    session: DeviceSession,
    predictor: LatencyPredictor,
    told: Told | None = None,
    note: str = "",
) -> Explanation:
    """Explain a model: with the stair edges of its width space where it has one, else with a line that says why not."""
    from hwsearch.latency.explain import explain, explain_choice, named_kernels
    from hwsearch.latency.lowering import Lowering
    from hwsearch.latency.network import NetworkLatency
    from hwsearch.latency.quantising import template_for

    try:
        if note:
            raise InputError(note.removeprefix("no stair edges: "))
        plain, choice = _space_of(argument)
    except (InputError, UnsupportedModelError) as error:
        note = f"no stair edges: {error}"
        return explain(onnx, named_kernels(onnx, kernels, session), predictor, note=note)
    template = template_for(plain, session.device.precision)
    latency = NetworkLatency(template.space, predictor, Lowering(template, session))
    return explain_choice(latency, choice, template.slice(choice), told=told)


def _space_of(argument: ModelArgument) -> tuple[OnnxTemplate, WidthChoice]:
    """The model's width space as ONNX, and where in it the model stands.

    A shrunk network in a model folder stands below the full widths of its factory, so that wider ones can be looked at
    too; any other model is its own full width.

    Raises:
        InputError, UnsupportedModelError: it has no width space; the message says why.
    """
    from hwsearch.graph.onnx_build import OnnxTemplate
    from hwsearch.graph.widths import WidthChoice, WidthSpace
    from hwsearch.reparam.fold import fold

    if argument.module is None:
        raise InputError("an ONNX file has no width space")
    module, example, widths = argument.full_module(), argument.example_input, argument.widths
    space = WidthSpace.from_model(module, example)
    if len(space.groups) > _MOST_GROUPS:
        raise InputError(
            f"the model has {len(space.groups)} width groups; edges are looked for in up to {_MOST_GROUPS}"
        )
    names = [group.name for group in space.groups]
    if not widths:
        choice = space.full()
    elif set(names) == set(widths):
        choice = WidthChoice(tuple(widths[name] for name in names))
    else:
        # The folder's groups are not those of this release: explain the network as it stands.
        module = argument.need_module()
        space = WidthSpace.from_model(module, example)
        choice = space.full()
    return OnnxTemplate(space, fold(module, example, require=False), example), choice


def show_explanation(console: Console, title: str, found: Explanation) -> None:
    """The layers as a table, then the sentences."""
    columns = ["layer", "kernels", "ms", "%", "bound", "channels", "down to", "saves ms", "free up to"]
    if not found.stairs:
        columns = columns[:6]
    rows = []
    for layer in found.layers:
        channels = "" if layer.channels is None else str(layer.channels)
        if layer.channels is not None and layer.runs_as is not None and layer.runs_as > layer.channels:
            channels += f" as {layer.runs_as}"
        row = [layer.name, _kernels(layer), f"{layer.ms:.4g}", f"{100 * layer.share:.1f}", layer.bound, channels]
        rows.append(row + (_edge_cells(layer) if found.stairs else []))
    costs = [layer.ms for layer in found.layers]
    if found.overhead_ms > 0:
        rest = ["the network itself", "", f"{found.overhead_ms:.4g}", f"{100 * found.overhead_ms / found.ms:.1f}"]
        rows.append([*rest, "overhead", *([""] * (len(columns) - 5))])
        costs.append(found.overhead_ms)
    _show_rows(console, title, columns, rows, costs)
    if found.note:
        console.show(found.note)
    console.show("Why it is not faster:")
    for reason in found.reasons:
        console.show(f"  {reason}")


def _show_rows(console: Console, title: str, columns: list[str], rows: list[list[str]], costs: Sequence[float]) -> None:
    """A table of what takes ``costs`` milliseconds; of a very deep network its dearest rows alone, in their order."""
    dearest = sorted(range(len(rows)), key=lambda at: -costs[at])
    console.table(title, columns, [rows[at] for at in sorted(dearest[:_MOST_ROWS])])
    if rest := dearest[_MOST_ROWS:]:
        console.show(
            f"{len(rest)} more, cheaper each, take {sum(costs[at] for at in rest):.4g} ms together; --json lists all"
        )


def _edge_cells(layer: LayerCost) -> list[str]:
    if layer.stair is None:
        return ["", "", ""]
    down = ["-", ""] if layer.down is None else [str(layer.down), f"{layer.stair.saved_ms:.3g}"]
    return [*down, "-" if layer.up is None else str(layer.up)]


def _kernels(layer: Any) -> str:
    """``conv + 2 reorder``: the families of a layer's kernels, each counted."""
    counts: dict[str, int] = {}
    for cost in layer.kernels:
        counts[cost.kernel.family] = counts.get(cost.kernel.family, 0) + 1
    return " + ".join(name if number == 1 else f"{number} {name}" for name, number in counts.items())


def _node(kernel: Kernel) -> str:
    return kernel.node or kernel.op
