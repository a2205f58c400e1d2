"""``deploy``: a network as a bundle, the folder that proves on the device that it keeps its budget.

The format and its reading half are in ``reader.py``, which needs no PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsearch.deploy.arrays import DTYPES, npy_bytes
from hwsearch.deploy.folder import write_folder
from hwsearch.deploy.reader import (
    MANIFEST,
    MAX_CASES,
    SCHEMA,
    VERSION,
    Bundle,
    Golden,
    is_bundle,
    listed_names,
    read_bundle,
)
from hwsearch.errors import CheckFailedError, HwsearchError, InputError, UnsupportedModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hwsearch.deploy.quantise import Int8Settings
    from hwsearch.device.spec import Device
    from hwsearch.train.task import Task

__all__ = ["Bundle", "deploy", "read_bundle"]

#: What a network's file may be made in; a ``float16`` or ``bfloat16`` device rounds a file of float32 as it loads it.
PRECISIONS = ("float32", "int8")
#: How far a runtime may be off by what it computes in, relative to the largest golden output.
_TOLERANCES = {"float16": 2e-2, "bfloat16": 5e-2}
REPORT, CANARY = "quantisation.json", "canary.onnx"
#: The fold's check, where something was folded.
FOLD_PROOF = "fold.json"
_KEYS = {"float": "reference"}
#: What hwsearch itself puts beside a bundle, about that very bundle.
_MADE_OF_IT = frozenset({"verdict.json", "report.html"})


def deploy(
    model: nn.Module,
    example_input: torch.Tensor,
    device: Device,
    folder: str | os.PathLike[str],
    *,
    budget_ms: float | None = None,
    predicted_ms: float | None = None,
    measured_ms: float | None = None,
    name: str | None = None,
    cases: int = 3,
    seed: int = 0,
    relative_tolerance: float | None = None,
    precision: str | None = None,
    calibration: torch.Tensor | None = None,
    task: Task | None = None,
    int8: Int8Settings | None = None,
    price: Callable[[bytes], tuple[float | None, float | None]] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Bundle:
    """Write a network as a bundle: folded, exported to ONNX, with golden cases, hashes and its promise in milliseconds.

    Golden outputs are those of the model as given, before folding and export, so that ``verify`` judges both. An 8-bit
    network's golden inputs are held-out images, its golden outputs its own; the float network's stand beside them, with
    how much of them it promises to leave (see ``hwsearch.deploy.int8``), and a report of every layer.

    Args:
        model: in eval mode; folded or not (batch norm behind a convolution is folded into it here). Not changed.
        example_input: (N, ...) static shape of the deployed network; also the first golden input.
        device: what the budget is meant for.
        folder: a new folder, an empty one, or an older bundle, which is replaced in one step.
        budget_ms, predicted_ms, measured_ms: what is known; above 0, milliseconds.
        cases: golden cases, 1 to 64; those after the first are random, of the example's mean and spread.
        relative_tolerance: how far a runtime may be off, relative to the largest golden output; of a float network.
            By default 1e-4, and 0.02 on a ``float16``, 0.05 on a ``bfloat16`` device.
        precision: ``"float32"`` or ``"int8"``; None is the device's own.
        calibration: for 8 bits: held-out training inputs (N, C, ...), as the network gets them; never of a test set.
        task: for 8 bits: gives such inputs from its ``valid``, and judges by its metric on the rest of them.
        int8: how it is brought to 8 bits, and which layers stay in float32.
        price: (predicted, measured) milliseconds of the network as it is written, in place of those given.
        tell: told in a line what was found on the way to 8 bits.
    Raises:
        InputError: a value out of range, training mode, a folder that holds something else or cannot be written, 8 bits
            without images.
        UnsupportedModelError: the model cannot be traced or exported; the message names the operation.
        CheckFailedError: 8 bits lose more than they may.

    Example:
        >>> bundle = deploy(model, torch.zeros(1, 1, 28, 28), device, "bundle", budget_ms=1.5)   # doctest: +SKIP
    """
    from hwsearch.device.canary import canary_bytes
    from hwsearch.graph.onnx_build import export_onnx
    from hwsearch.reparam.fold import fold

    given = {"budget_ms": budget_ms, "predicted_ms": predicted_ms, "measured_ms": measured_ms}
    for key, value in given.items():
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise InputError(f"{key} is {value!r}: give milliseconds above 0, or leave it out")
    if not 1 <= cases <= MAX_CASES:
        raise InputError(f"cases is {cases!r}: give 1 to {MAX_CASES}")
    precision = device.precision if precision is None else precision
    if precision not in (*PRECISIONS, device.precision):
        raise InputError(f"precision is {precision!r}: give one of {', '.join(PRECISIONS)}, or the device's own")
    if relative_tolerance is None:
        relative_tolerance = _TOLERANCES.get(precision, 1e-4)
    if not 0 < relative_tolerance <= 0.1:
        raise InputError(f"relative_tolerance is {relative_tolerance!r}: give a number above 0, at most 0.1")
    target = Path(folder)
    _refuse_foreign(target)
    folded = fold(model, example_input, require=False)
    golden = _golden(model, example_input, cases, seed)
    files = {"model.onnx": export_onnx(folded, example_input)}
    if proof := fold_proof(model, folded, example_input):
        files[FOLD_PROOF] = proof
    facts = _device_facts(device)
    extra: dict[str, Any] = {}
    if precision == "int8":
        from hwsearch.deploy.int8 import int8_network
        from hwsearch.deploy.quantise import Int8Settings, scheme_for

        eight = int8_network(
            model, folded, files["model.onnx"], calibration=calibration, task=task, settings=int8 or Int8Settings(),
            scheme=scheme_for((facts["fingerprint"] or {}).get("isa", "")), cases=cases, tell=tell,
        )  # fmt: skip
        golden, relative_tolerance = list(eight.cases), eight.relative_tolerance
        files |= {"model.onnx": eight.quantised.onnx, REPORT: _json(eight.report.to_dict())}
        extra = {"quantisation": {**eight.facts(), "report": REPORT}}
    files[CANARY] = canary_bytes()
    if price is not None:
        given["predicted_ms"], given["measured_ms"] = price(files["model.onnx"])
    names = [("input", "output", "float")[: 2 if case.reference is None else 3] for case in golden]
    for number, case in enumerate(golden):
        arrays = (case.input, case.output, case.reference)
        files |= {
            f"{name}_{number}.npy": npy_bytes(array)
            for name, array in zip(names[number], arrays, strict=False)
            if array is not None
        }
    manifest = {
        "schema": SCHEMA,
        "version": VERSION,
        "name": name or type(model).__name__,
        "device": device.name,
        "precision": precision,
        "input_name": "input",
        "output_name": "output",
        "input_shape": list(golden[0].input.shape),
        "output_shape": list(golden[0].output.shape),
        "tolerance": {"relative": relative_tolerance, "absolute": 1e-5},
        "parameters": sum(p.numel() for p in folded.parameters()),
        "macs": _macs(folded, example_input),
        "model": "model.onnx",
        "canary": CANARY,
        "cases": [
            {_KEYS.get(name, name): f"{name}_{number}.npy" for name in found} for number, found in enumerate(names)
        ],
        "files": {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in sorted(files.items())},
        **given,
        **facts,
        **extra,
    }
    files[MANIFEST] = _json(manifest)
    write_folder(target, files)
    return read_bundle(target)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def fold_proof(model: nn.Module, folded: nn.Module, example_input: torch.Tensor) -> bytes | None:
    """The report of the fold's check (see ``hwsearch.reparam.check``) as JSON; None where nothing was folded.

    A network that random statistics make chaotic is compared as it is; ``ok`` is null where it is chaotic even so.

    Raises:
        CheckFailedError: the fold is wrong.
    """
    from hwsearch.reparam.check import prove
    from hwsearch.reparam.fold import plan_fold

    plan = plan_fold(model, example_input)
    if not plan.pairs and not plan.blocks:
        return None
    for repeats in (1, 0):
        try:
            report = prove(model, folded, example_input.shape, repeats=repeats)
        except CheckFailedError as error:
            reason = str(error)
            continue
        return _json(report.require().to_dict())
    return _json({"schema": "hwsearch.fold_report", "version": 1, "ok": None, "reason": reason})


def _golden(model: nn.Module, example_input: torch.Tensor, cases: int, seed: int) -> list[Golden]:
    """The example and random inputs of its mean and spread, with the model's own answers."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    spread, mean = example_input.float().std(unbiased=False).item() or 1.0, example_input.float().mean().item()
    golden = []
    with torch.no_grad():
        for number in range(cases):
            noise = torch.randn(example_input.shape, generator=generator).to(example_input)
            values = example_input if number == 0 else noise * spread + mean
            output = model(values)
            if not isinstance(output, torch.Tensor):
                raise UnsupportedModelError(f"the model returns {type(output).__name__}: a bundle needs one tensor")
            found = str(output.dtype).removeprefix("torch.")
            if found not in DTYPES or not output.numel():
                raise UnsupportedModelError(
                    f"the model returns {found} of shape {tuple(output.shape)}: a bundle needs numbers to compare, of "
                    + ", ".join(DTYPES)
                )
            if not torch.isfinite(output).all():
                raise CheckFailedError(f"the model's output on golden input {number} is not finite: check its weights")
            golden.append(Golden(values.detach().cpu().numpy(), output.cpu().numpy()))
    return golden


def _macs(model: nn.Module, example_input: torch.Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        model(example_input)
    return int(counter.get_total_flops()) // 2  # it counts two for a multiply-accumulate


def _device_facts(device: Device) -> dict[str, Any]:
    """What ``device check`` found, None where the device has not been checked."""
    from hwsearch.device.check import DeviceCheck

    try:
        check = DeviceCheck.load(device.table_folder)
    except HwsearchError:
        return {"noise_floor": None, "reference_ms": None, "fingerprint": None}
    facts = {"noise_floor": check.noise_floor, "reference_ms": check.reference_ms}
    return {**facts, "fingerprint": check.fingerprint.to_dict()}


def _refuse_foreign(folder: Path) -> None:
    """A folder that is neither new, nor empty, nor a bundle is never touched."""
    try:
        if not folder.exists():
            return
        entries = sorted(p.name for p in folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror}): choose another folder") from error
    if not entries:
        return
    # what is put in the place of an older bundle takes its files away, and nobody else's
    own = listed_names(folder) | _MADE_OF_IT if is_bundle(folder) else frozenset()
    if others := [name for name in entries if name not in own]:
        raise InputError(f"{folder} holds other things ({', '.join(others[:3])}): choose a new folder, or empty it")
