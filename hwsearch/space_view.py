"""``hwsearch space``: a model's width space with the user's rules, priced by a device's predictor or by MACs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hwsearch.console import Console
from hwsearch.errors import InputError
from hwsearch.graph.space_table import SpaceTable
from hwsearch.model_argument import load_model_argument, parse_inputs

if TYPE_CHECKING:
    from hwsearch.graph.onnx_build import OnnxTemplate
    from hwsearch.graph.widths import WidthSpace


def space_of(
    model: str | None,
    config: Path | None,
    shape: str | None,
    quantum: int,
    minimum: float | None,
    freeze: Sequence[str],
    allow_factory: str | None,
) -> tuple[WidthSpace, OnnxTemplate]:
    """The width space of a model, or of a config's, and its ONNX template.

    Raises:
        InputError: neither or both of model and config, or bad rules.
        UnsupportedModelError: the model cannot be captured.
    """
    from hwsearch.config import RunConfig
    from hwsearch.graph.control import GroupRule, bounded
    from hwsearch.graph.onnx_build import OnnxTemplate
    from hwsearch.graph.widths import WidthSpace
    from hwsearch.preparation import width_space
    from hwsearch.reparam.fold import fold

    if (model is None) == (config is None):
        raise InputError("give a model, or --config with a run's TOML file: one of the two")
    rules = [GroupRule(pattern, freeze=True) for pattern in freeze]
    lowest: int | float | None = minimum
    if minimum is not None and not 0 < minimum < math.inf:
        raise InputError(f"--minimum is {minimum}: give whole channels, or a share up to 1")
    if minimum is not None and minimum > 1:
        if minimum != int(minimum):
            raise InputError(f"--minimum is {minimum}: give whole channels, or a share up to 1")
        lowest = int(minimum)
    if config is not None:
        settings = RunConfig.load(config)
        argument = load_model_argument(
            settings.model.factory, settings.model.input_shape, settings.model.kwargs, allow_factory=allow_factory
        )
        space, module = width_space(settings, argument.need_module(), argument.example_input, rules)
        return space, OnnxTemplate(space, fold(module, argument.example_input, require=False), argument.example_input)
    argument = load_model_argument(str(model), parse_inputs(shape) if shape else None, allow_factory=allow_factory)
    module, example = argument.need_module(), argument.example_input
    space = WidthSpace.from_model(module, example, quantum=quantum, minimum=lowest)
    if rules:
        space = bounded(space, example, rules)
        module = space.model or module
    return space, OnnxTemplate(space, fold(module, example, require=False), example)


def table_of(space: WidthSpace, template: OnnxTemplate, device_name: str | None, console: Console) -> SpaceTable:
    """The table, in milliseconds of a device with a predictor, else in millions of MACs.

    Raises:
        InputError: the device has no predictor.
    """
    if device_name is None:
        return SpaceTable.of(space, lambda choices: space.macs_array(choices) / 1e6, unit="MMACs")
    from hwsearch.device.session import open_session
    from hwsearch.device.spec import Device
    from hwsearch.latency.lowering import Lowering
    from hwsearch.latency.network import NetworkLatency
    from hwsearch.latency.predictor import OutOfRangeWarning
    from hwsearch.preparation import predictor_of

    device = Device.load(device_name)
    with open_session(device, message=console.say) as session, warnings.catch_warnings():
        warnings.simplefilter("ignore", OutOfRangeWarning)
        latency = NetworkLatency(space, predictor_of(device, session.fingerprint), Lowering(template, session))
        return SpaceTable.of(space, latency.evaluate)
