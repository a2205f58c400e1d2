"""What must hold for every width space: used by the unit tests and the property tests alike."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from hwsearch.graph.capture import capture
from hwsearch.graph.dependencies import extract
from hwsearch.graph.growth import grow
from hwsearch.graph.surgery import first_tensor, kill_units, randomise, shrink
from hwsearch.graph.widths import WidthChoice, WidthSpace


def random_keep(space: WidthSpace, choice: WidthChoice, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random kept units of every group, as many as the choice says."""
    return {g.name: rng.permutation(g.units)[:w] for g, w in zip(space.groups, choice.widths, strict=True)}


def check_exact(
    model: nn.Module, example: Tensor, *, seed: int = 0, rounds: int = 1, units: tuple[int, ...] = ()
) -> WidthSpace:
    """Shrinking to random units equals killing the others, growing changes nothing, MACs and parameters agree, no
    parameter axis is forgotten.

    The space is made with ``verify=False``: the extraction itself is put to the test, not the net that freezes what
    fails.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model, example = model.double().eval(), example.double()
    randomise(model)
    space = WidthSpace.from_model(model, example, verify=False)
    if units:
        assert tuple(group.units for group in space.groups) == units
    check_complete(space)
    for choice in [space.smallest(), *(space.sample(rng) for _ in range(rounds))]:
        keep = random_keep(space, choice, rng)
        small = shrink(model, space, choice, keep)
        network = capture(small, example)
        assert network.macs == space.macs(choice)
        assert network.parameters == space.parameters(choice)
        assert {name: space.axis_sizes(name, choice) for name in network.shapes} == network.shapes
        if min(choice.widths) > 1:  # at one channel per group, a grouped convolution is another thing: a depth-wise one
            left = [unit.positions[0].shape[0] for unit in extract(network).units]
            assert [units for units in left if units > 1] == list(choice.widths)
        if all(group.neutral for group in space.groups):
            assert difference_to_dead(model, small, space, keep, example) < 1e-9
    assert growth_difference(model, space, example, rng) < 1e-9
    return space


def check_architecture(model: nn.Module, example: Tensor, *, seed: int = 0) -> WidthSpace:
    """Everything that an architecture has to show; values are compared in float64 with random weights.

    All groups at half width run and export with the MACs and parameters that the space says; random halves of the
    neutral groups equal the full network with the others dead; grown groups compute the same (whole multiples where an
    operation mixes over the channels); every parameter axis is in a group, frozen with a reason, or unused.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model, example = model.double().eval(), example.double()
    randomise(model)
    space = WidthSpace.from_model(model, example)
    check_complete(space)
    half = WidthChoice(tuple(max(1, group.units // 2) for group in space.groups))
    network = capture(shrink(model, space, half), example)
    assert network.output_shape == space.network.output_shape
    assert network.macs == space.macs(half)
    assert network.parameters == space.parameters(half)
    pairs = zip(space.groups, half.widths, strict=True)
    neutral = WidthChoice(tuple(width if group.neutral else group.units for group, width in pairs))
    keep = random_keep(space, neutral, rng)
    assert difference_to_dead(model, shrink(model, space, neutral, keep), space, keep, example) < 1e-9
    assert growth_difference(model, space, example, rng) < 1e-9
    return space


def growth_difference(model: nn.Module, space: WidthSpace, example: Tensor, rng: np.random.Generator) -> float:
    """Largest difference, relative to the output, between ``model`` and itself grown in every group."""
    widths, source = {}, {}
    for group in space.groups:
        widths[group.name] = group.units + int(rng.integers(1, group.units + 2)) if group.neutral else 2 * group.units
        if group.neutral:
            source[group.name] = rng.integers(0, group.units, widths[group.name] - group.units)
    wide = grow(model, space, widths, source=source, check=False)
    with torch.no_grad():
        wanted, got = first_tensor(model(example)), first_tensor(wide(example))
    assert float(wanted.abs().max()) > 0
    return float((wanted - got).abs().max() / wanted.abs().max())


def difference_to_dead(
    model: nn.Module, small: nn.Module, space: WidthSpace, keep: dict[str, np.ndarray], example: Tensor
) -> float:
    """Largest difference, relative to the output, between ``small`` and ``model`` with the other units dead."""
    dropped = {group.name: np.setdiff1d(np.arange(group.units), keep[group.name]) for group in space.groups}
    with torch.no_grad():
        wanted = first_tensor(kill_units(model, space, dropped)(example))
        got = first_tensor(small(example))
    assert float(wanted.abs().max()) > 0
    return float((wanted - got).abs().max() / wanted.abs().max())


def check_complete(space: WidthSpace) -> None:
    """Every position of every parameter axis is in one group, or frozen with a reason, or a kernel extent."""
    found = extract(space.network)
    counted: dict[tuple[str, int], int] = {}
    for unit in found.units:
        for slot, positions in zip(unit.slots, unit.positions, strict=True):
            counted[slot] = counted.get(slot, 0) + positions.size
    for item in found.frozen:
        counted[item.parameter, item.axis] = counted.get((item.parameter, item.axis), 0) + item.elements
    for name, shape in space.network.shapes.items():
        for axis, size in enumerate(shape):
            kernel_extent = axis >= 2 and (name, axis) not in counted
            assert size == 1 or kernel_extent or counted.get((name, axis)) == size, (name, axis)
