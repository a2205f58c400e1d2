"""Prove a fold: run the unfolded network beside the folded one where mistakes show, and each block beside its fold.

Fresh batch norms (mean 0, variance 1, gamma 1, beta 0) hide almost every folding bug, so each case but the first draws
new statistics: negative and zero gammas, shifted means, its own eps. Running statistics are drawn around those of the
network's own activations, so that a deep network stays sane and its error means something. The reference is always the
*unfolded* network in float64; the tolerance is what float arithmetic alone does to the unfolded network.

Reference: RepVGG tools/verify.py (randomised statistics); tolerance rule: relative to the network's own rounding noise.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwsearch.errors import CheckFailedError, InputError
from hwsearch.reparam.border import BlockCase, block_cases
from hwsearch.reparam.fold import fold, fold_blocks, plan_fold
from hwsearch.reparam.statistics import randomise

_EPS32 = torch.finfo(torch.float32).eps
#: A network may have this many times the rounding noise measured on its unfolded self (one sample is not its bound).
_MARGIN = 16
#: A network whose float32 rounding noise is above this share of its output is chaotic: it cannot prove a fold.
_CHAOTIC = 1e-2


@dataclass(frozen=True, slots=True)
class FoldCase:
    """One comparison: ``statistics`` "as given" or "random", on inputs of one kind.

    Errors are the largest over all outputs; the relative ones are divided by the largest output. ``noise`` is the
    relative error of the *unfolded* network at this precision, ``tolerance`` what the folded one may have.
    """

    statistics: str
    inputs: str
    dtype: str
    seed: int
    max_abs_error: float
    max_relative_error: float
    noise: float
    tolerance: float
    ok: bool


@dataclass(frozen=True, slots=True)
class FoldReport:
    """Result of ``prove``: every case, the folded (layer, batch norm) pairs and what stayed, with the reason.

    ``blocks``: each block of branches by itself, border and interior apart (``hwsearch.reparam.border``);
    ``folded_blocks``: (name, "odbb" or the method of another library's block).
    """

    model: str
    pairs: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]
    cases: tuple[FoldCase, ...]
    blocks: tuple[BlockCase, ...] = ()
    folded_blocks: tuple[tuple[str, str], ...] = ()

    @property
    def ok(self) -> bool:
        """True when every case and every block is within its tolerance."""
        return all(case.ok for case in self.cases) and all(block.ok for block in self.blocks)

    @property
    def max_abs_error(self) -> float:
        """Largest absolute error over the cases."""
        return max(case.max_abs_error for case in self.cases)

    @property
    def max_relative_error(self) -> float:
        """Largest error relative to the largest output, over the cases."""
        return max(case.max_relative_error for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        head = {"schema": "hwsearch.fold_report", "version": 1, "ok": self.ok}
        errors = {"max_abs_error": self.max_abs_error, "max_relative_error": self.max_relative_error}
        return {**head, **errors, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the report as JSON.

        Raises:
            InputError: the file cannot be written.
        """
        path = Path(path)
        temporary = path.parent / f".{path.name}.{os.getpid()}"
        try:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise InputError(f"cannot write {path}: {error.strerror or error}; choose a writable path") from error

    def require(self) -> FoldReport:
        """The report itself. Raises CheckFailedError naming the worst block or case when the fold is wrong."""
        if bad := [block for block in self.blocks if not block.ok]:
            first = max(bad, key=lambda block: max(block.border_error, block.interior_error))
            raise CheckFailedError(
                f"the fold of block {first.name!r} of {self.model} is wrong: relative error {first.border_error:.2g} "
                f"on the border and {first.interior_error:.2g} inside, {first.tolerance:.2g} allowed (random "
                f"statistics, seed {first.seed}); do not deploy it"
            )
        wrong = [case for case in self.cases if not case.ok]
        if wrong:
            worst = max(wrong, key=lambda case: case.max_relative_error / max(case.tolerance, 1e-300))
            raise CheckFailedError(
                f"the fold of {self.model} is wrong in {len(wrong)} of {len(self.cases)} cases: relative error "
                f"{worst.max_relative_error:.2g} against {worst.tolerance:.2g} allowed ({worst.dtype}, "
                f"{worst.statistics} statistics, {worst.inputs} inputs, seed {worst.seed}); do not deploy it"
            )
        return self


def prove(
    model: nn.Module,
    folded: nn.Module | None,
    input_shape: Sequence[int],
    seed: int = 0,
    *,
    repeats: int = 3,
    fold_function: Callable[[nn.Module], nn.Module] | None = None,
) -> FoldReport:
    """Compare a network with its fold, as given and then ``repeats`` times under random batch norm statistics.

    Args:
        model: the unfolded network in eval mode; not changed.
        folded: its fold, compared as given; None to look only at the random cases.
        input_shape: (N, C, H, W) or whatever the network takes, batch first; sizes at least 1.
        seed: of statistics and inputs; the report is a function of the arguments.
        repeats: number of draws of the statistics (each folded anew), each in float64 and float32 on three inputs.
        fold_function: what folds a copy; ``fold`` by default.
    Raises:
        InputError: training mode, nothing foldable, a bad shape.
        CheckFailedError: never for a wrong fold (see ``FoldReport.require``), only for one that cannot be judged
            because the network itself is chaotic or not finite.
    """
    if not input_shape or any(int(size) < 1 for size in input_shape):
        raise InputError(f"input shape {tuple(input_shape)} has no elements: give sizes of at least 1, batch first")
    generator = torch.Generator().manual_seed(seed)
    inputs = _inputs(tuple(int(size) for size in input_shape), generator)
    plan = plan_fold(model, inputs["normal"].to(_dtype(model)))
    make_fold = fold_function or (lambda network: fold(network, inputs["normal"].to(_dtype(network))))
    cases = [] if folded is None else _cases(model, folded, inputs, "as given", seed)
    blocks: list[BlockCase] = []
    for repeat in range(repeats):
        network = copy.deepcopy(model).double()
        randomise(network, inputs["normal"].double(), torch.Generator().manual_seed(seed + 1 + repeat))
        if any(kind != "odbb" for _, kind in plan.blocks):
            network = network.float()  # many blocks of other libraries make float32 kernels, and fail in float64
        folded = make_fold(network)
        cases += _cases(network, folded, inputs, "random", seed + 1 + repeat)
        if plan.blocks:
            without_pairs = fold_blocks(network, inputs["normal"].to(_dtype(network)))[0]
            blocks += block_cases(network, without_pairs, plan.blocks, inputs["normal"], seed + 1 + repeat)
    return FoldReport(type(model).__name__, plan.pairs, plan.left, tuple(cases), tuple(blocks), plan.blocks)


def _inputs(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Inputs of non-zero mean (a zero mean hides border mistakes), a constant one, and large values."""
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    return {"normal": normal + 0.3, "constant": torch.full(shape, 0.7, dtype=torch.float64), "large": 20 * normal - 5}


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _cases(
    model: nn.Module, folded: nn.Module, inputs: dict[str, Tensor], statistics: str, seed: int
) -> list[FoldCase]:
    """Both networks, both precisions, every input. Weights are cast from what each network holds."""
    exact = copy.deepcopy(model).double()
    single = copy.deepcopy(model).float()
    networks = {torch.float64: copy.deepcopy(folded).double(), torch.float32: copy.deepcopy(folded).float()}
    # A fold made and stored in float32 carries float32 rounding in its weights, whatever precision it is run in.
    stored = max(torch.finfo(_dtype(network)).eps for network in (model, folded))
    cases = []
    for kind, values in inputs.items():
        expected = _run(exact, values)
        scale = max((float(t.abs().max()) for t in expected if t.numel()), default=0.0)
        noise32 = _error(_run(single, values.float()), expected) / max(scale, 1e-30)
        if not noise32 < _CHAOTIC:
            raise CheckFailedError(
                f"{type(model).__name__} cannot prove a fold: float32 alone changes its output by {noise32:.2g} of "
                f"the largest value ({statistics} statistics, {kind} inputs); look for NaN, recalibrate its batch norms"
            )
        amplification = max(noise32 / _EPS32, 4.0)  # how much the network magnifies rounding
        for dtype, network in networks.items():
            eps = torch.finfo(dtype).eps
            noise, tolerance = noise32 / _EPS32 * eps, _MARGIN * amplification * max(eps, stored)
            error = _error(_run(network, values.to(dtype)), expected)
            relative = error / max(scale, 1e-30)
            name = str(dtype).removeprefix("torch.")
            ok = relative <= tolerance
            cases.append(FoldCase(statistics, kind, name, seed, error, relative, noise, tolerance, ok))
    return cases


def _run(model: nn.Module, values: Tensor) -> list[Tensor]:
    """All floating point outputs of a network, in float64."""
    from torch.utils._pytree import tree_leaves

    with torch.no_grad():
        outputs = tree_leaves(model(values))
    return [tensor.double() for tensor in outputs if isinstance(tensor, Tensor) and tensor.is_floating_point()]


def _error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest absolute difference; infinite when shapes differ or a value is not a number."""
    if [t.shape for t in got] != [t.shape for t in expected]:
        return float("inf")
    errors = [float((a - b).abs().max()) for a, b in zip(got, expected, strict=True) if a.numel()]
    return float("inf") if any(e != e for e in errors) else max(errors, default=0.0)
