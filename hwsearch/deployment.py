"""The verb ``deploy``: a bundle of any model, with what the device's predictor and stopwatch say of it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwsearch.console import Console
from hwsearch.errors import HwsearchError, InputError
from hwsearch.model_argument import ModelArgument

if TYPE_CHECKING:
    from hwsearch.config_data import DataSettings
    from hwsearch.deploy.quantise import Int8Settings
    from hwsearch.deploy.reader import Bundle
    from hwsearch.device.spec import Device
    from hwsearch.train.task import Task


#: Training images of the named data that calibrate and judge.
_IMAGES = 2500


@dataclass(frozen=True)
class DeployOptions:
    """What the command line asks for; ``keep_fp32`` as it was typed, ``data`` as for ``load_task``."""

    budget_ms: float | None = None
    precision: str | None = None
    data: str | None = None
    keep_fp32: str | None = None
    tolerance: float | None = None
    measure: bool = False


def deploy_model(
    argument: ModelArgument, device: Device, output: Path, options: DeployOptions, console: Console
) -> Bundle:
    """Write the bundle; milliseconds are predicted where the device has a predictor, and measured where asked for.

    Raises:
        InputError: options that do not go together, 8 bits without data, or what ``deploy`` raises.
    """
    from hwsearch.deploy.bundle import PRECISIONS, deploy
    from hwsearch.search.budget import checked_ms

    if options.budget_ms is not None:
        checked_ms(options.budget_ms, "--budget-ms")
    precision = options.precision or device.precision
    if precision not in (*PRECISIONS, device.precision):
        raise InputError(f"--precision is {precision!r}: give one of {', '.join(PRECISIONS)}")
    eight = precision == "int8"
    for name in ("data", "keep_fp32", "tolerance"):
        if not eight and getattr(options, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is for 8 bits: leave it out, or add --precision int8")
    settings = _settings(options)
    module = argument.need_module()
    task = _task(argument, options.data) if eight else None
    with _Pricing(device, precision, options.measure, console) as price:
        bundle = deploy(
            module, argument.example_input, device, output, budget_ms=options.budget_ms, precision=precision,
            task=task, int8=settings, price=price, tell=console.say,
        )  # fmt: skip
    known = bundle.predicted_ms if bundle.measured_ms is None else bundle.measured_ms
    if options.budget_ms is not None and known is not None and known > options.budget_ms:
        how = "predicted" if bundle.measured_ms is None else "measured"
        console.say(
            f"its {known:.4g} ms, as {how}, are above the {options.budget_ms:.4g} ms of --budget-ms: it will not pass "
            "hwsearch verify"
        )
    return bundle


class _Pricing:
    """What a bundle is told of its milliseconds; the device is asked only where that can answer something."""

    def __init__(self, device: Device, precision: str, measure: bool, console: Console) -> None:
        self.device, self.measure, self.console = device, measure, console
        self.predicts = device.precision == precision
        self._session: Any = None

    def __enter__(self) -> Any:
        from hwsearch.device.session import open_session
        from hwsearch.estimation import pricer
        from hwsearch.preparation import PREDICTOR, ensure_checked, predictor_of

        known = self.predicts and (self.device.table_folder / PREDICTOR).is_dir()
        if not known and not self.measure:
            return None
        self._session = open_session(self.device, message=self.console.say)
        try:
            predictor = None
            if known:
                try:
                    predictor = predictor_of(self.device, self._session.fingerprint)
                except HwsearchError as error:  # the bundle is as good without it
                    self.console.say(f"milliseconds are not predicted: {error}")
            reference = ensure_checked(self.device, self._session, self.console) if self.measure else None
            return pricer(self.device, self._session, predictor, reference)
        except BaseException:
            self._session.close()
            raise

    def __exit__(self, *error: object) -> None:
        if self._session is not None:
            self._session.close()


def _settings(options: DeployOptions) -> Int8Settings:
    """``--keep-fp32`` and ``--tolerance`` as settings."""
    from hwsearch.deploy.quantise import Int8Settings

    given: dict[str, Any] = {} if options.tolerance is None else {"tolerance": options.tolerance}
    text = options.keep_fp32
    if text is not None:
        if re.fullmatch("[0-9]{1,9}", text.strip()):  # str.isdigit takes a superscript two for a digit
            given["keep_fp32"] = int(text)
        elif text.strip() == "auto":
            given["keep_fp32"] = "auto"
        else:
            given["keep_fp32"] = tuple(name.strip() for name in text.split(",") if name.strip())
    return Int8Settings(**given)


def _task(argument: ModelArgument, data: str | None) -> Task:
    """The data that was named, else those of the run that the model was found in; code of theirs has to be named."""
    from hwsearch.config_data import DataSettings, named_data
    from hwsearch.train.task import load_task

    stored, seed = _stored_data(argument.spec)
    if data is None:
        if stored is None:
            raise InputError(
                "8 bits are calibrated on held-out training images: add --data, such as --data fashion-mnist or a "
                "folder"
            )
        if stored.factory is not None:
            raise InputError(
                f"the data of {argument.spec} are what {stored.factory} returns, and loading runs its code: if you "
                f"trust it, name it: --data {stored.factory}"
            )
        return stored.load(seed)[0]
    named: dict[str, Any] = dict(named_data(data))
    if "kind" in named:
        return load_task(data, valid=_IMAGES)[0]
    if "folder" in named:  # pictures at the size that the network takes, where it is square
        side = argument.input_shape[-1]
        square = argument.input_shape[-2:] == (side, side)
        return DataSettings(folder=data, size=side if square else None).load(0)[0]
    if stored is not None and stored.factory is not None and stored.factory == named.get("factory"):
        return stored.load(seed)[0]  # with the arguments of the run
    return DataSettings(**named).load(0)[0]


def _stored_data(folder: str) -> tuple[DataSettings | None, int]:
    """``[data]`` and the seed of a run folder; None where there is none that can be read."""
    from pydantic import TypeAdapter

    from hwsearch.config_data import DataSettings

    try:
        settings = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["settings"]
        return TypeAdapter(DataSettings).validate_python(settings["data"]), int(settings["run"]["seed"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, InputError):
        return None, 0
