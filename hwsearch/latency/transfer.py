"""A new device's predictor from a few of its networks and the predictors of other devices.

Those are turned into prices on the new device (``transfer_map.py``): three rates a source, which each kernel family may
differ from a little, fitted on the networks that were timed. So every network whose kernels are known,
timed or not, gets a price, and an ordinary ``LatencyPredictor`` is fitted on the timed networks and the priced ones
together. Calibration and interval come from the timed ones alone, each predicted while it was held out.

Example:
    >>> other = LatencyPredictor.load("latency_tables/other/predictor")     # doctest: +SKIP
    >>> predictor, table = transfer_device("my-board", [other])             # doctest: +SKIP
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hwsearch.device.session import DeviceSession, open_session
from hwsearch.device.spec import Device
from hwsearch.device.stopwatch import PROFILE, StopwatchSettings
from hwsearch.errors import HwsearchError, InputError
from hwsearch.graph.kernel import Kernel
from hwsearch.latency.boosting import BoostSettings
from hwsearch.latency.features import weight_mb
from hwsearch.latency.interval import Intervals, Profiled
from hwsearch.latency.model import KernelModel
from hwsearch.latency.predictor import LatencyPredictor
from hwsearch.latency.profile import current_check
from hwsearch.latency.sample import NetworkTemplate, PlannedNetwork, SamplingPlan
from hwsearch.latency.table import LatencyTable, NetworkSample
from hwsearch.latency.training import Rows
from hwsearch.latency.transfer_map import PARTS, fit_map, network_parts, parts_ms
from hwsearch.latency.transfer_sampler import choose_rows
from hwsearch.latency.validation import Calibration, OutOfFold, Progress, random_folds
from hwsearch.latency.visits import Network, Visit, combine

#: Fewer networks than this say nothing that a single factor would not.
FEWEST = 3
_CALIBRATED_FROM = 20
_PRICED_SPREAD = 0.05


def transfer(
    sources: Sequence[LatencyPredictor | LatencyTable],
    table: LatencyTable,
    *,
    untimed: Sequence[Sequence[Kernel]] = (),
    progress: Progress | None = None,
    **parameters: Any,
) -> LatencyPredictor:
    """A predictor of the new device, which can be saved, loaded and searched with like any other.

    Args:
        sources: predictors of other devices (a table is fitted first).
        table: what was timed on the new device, ``FEWEST`` networks or more.
        untimed: kernels of further networks as the new device would run them (``lower_plan``); the more kinds of
            kernels are among them, the more the predictor knows.
        progress: told (steps done, steps, message).
        parameters: of ``LatencyPredictor``.

    Raises:
        InputError: no sources, too few networks, or a hyper-parameter that makes no sense.
    """
    known = _fitted(sources)
    table.validate()
    if len(table.networks) < FEWEST:
        raise InputError(
            f"the table of {table.device!r} has {len(table.networks)} networks; time {FEWEST} or more to transfer to it"
        )
    # Fitted on the little there is: it knows the device, its fingerprint and its scatter, and checks the parameters.
    predictor = LatencyPredictor(**parameters).fit(table)
    settings = BoostSettings(**{name: getattr(predictor, name) for name in BoostSettings.__dataclass_fields__})
    pricing = _Pricing.of(known, table, untimed)
    fold = random_folds(len(table.networks), predictor.folds, predictor.seed)
    checked = _out_of_fold(pricing, predictor.cross_validation_, fold, settings, progress)
    if progress is not None:
        progress(predictor.folds, predictor.folds + 1, "fitting on all timed and priced networks")
    predictor.model_ = pricing.model(np.ones(len(table.networks), dtype=bool), settings)
    predictor.kinds_ = {}  # trees throughout: so few networks cannot choose
    rows = pricing.rows
    every = np.ones(len(table.networks), dtype=bool)
    predictor.calibration_ = _calibration(rows, checked.total_ms, every, predictor.model_.overhead_ms)
    errors = checked.log_error * _stretch(len(table.networks))
    predictor.log_errors_ = np.round(np.sort(errors), 6)
    # So few errors may all lie on one side by chance.
    both = np.concatenate([errors, -errors])
    predictor.intervals_ = Intervals.fit(both, np.zeros(len(both)))
    predictor.profiled_ = Profiled.of([*rows.kernels, *pricing.distinct])
    predictor.cross_validation_, predictor.family_validation_ = checked, None
    return predictor


@dataclass(frozen=True)
class _Pricing:
    """What the folds share: the timed networks' rows and parts, and the priced networks waiting for their prices."""

    table: LatencyTable
    rows: Rows
    parts: np.ndarray
    profiler_ms: float
    untimed: tuple[tuple[Kernel, ...], ...]
    distinct: tuple[Kernel, ...]
    distinct_parts: np.ndarray
    context_ms: tuple[np.ndarray, ...]

    @classmethod
    def of(
        cls, sources: Sequence[LatencyPredictor], table: LatencyTable, untimed: Sequence[Sequence[Kernel]]
    ) -> _Pricing:
        """Everything that does not depend on which networks are held out."""
        rows = Rows.of(table.networks)
        # Too few networks to see it in them (then 0): the sources' runtimes have profilers of the same kind.
        profiler_ms = rows.profiler_ms() or float(np.median([source.model_.profiler_ms for source in sources]))
        networks = tuple(tuple(kernels) for kernels in untimed if kernels)
        distinct = tuple(dict.fromkeys(kernel for kernels in networks for kernel in kernels))
        parts = np.zeros((len(distinct), len(sources), len(PARTS)))
        for index, source in enumerate(sources):
            parts[:, index] = parts_ms(source, distinct)
        context = []
        for kernels in networks:
            megabytes = weight_mb(kernels)
            whole = np.array([max(float(megabytes.sum()), 1e-12)])
            context.append(
                np.stack([s.calibration_.a * s.model_.context_ms(whole)[0] * megabytes for s in sources], axis=1)
            )
        return cls(table, rows, network_parts(sources, rows), profiler_ms, networks, distinct, parts, tuple(context))

    def model(self, timed: np.ndarray, settings: BoostSettings) -> KernelModel:
        """Fitted on some timed networks, a mask (M,), and on all priced ones."""
        rows = self.rows.only(timed)
        found = fit_map(rows, self.parts[timed[self.rows.network]], self.profiler_ms)
        ms = dict(zip(self.distinct, found.ms(self.distinct, self.distinct_parts), strict=True))
        samples = [sample for sample, use in zip(self.table.networks, timed, strict=True) if use]
        for number, (kernels, context) in enumerate(zip(self.untimed, self.context_ms, strict=True)):
            own = np.array([ms[kernel] for kernel in kernels]) + (context * found.of(kernels)[:, :, 1]).sum(axis=1)
            samples.append(_priced(number, kernels, own, found.overhead_ms, self.profiler_ms))
        return KernelModel.fit(Rows.of(samples), settings)


def _priced(
    number: int, kernels: tuple[Kernel, ...], ms: np.ndarray, overhead_ms: float, profiler_ms: float
) -> NetworkSample:
    """A network nobody timed, as a sample: shares as the profiler would have shown them."""
    total = float(ms.sum()) + overhead_ms
    seen = (ms + profiler_ms) / (ms + profiler_ms).sum() * total
    return NetworkSample(
        f"priced-{number:06d}", "priced", kernels, tuple(seen.tolist()), total, total, total, _PRICED_SPREAD, 1
    )


def _out_of_fold(
    pricing: _Pricing, alone: OutOfFold, fold: np.ndarray, settings: BoostSettings, progress: Progress | None
) -> OutOfFold:
    """As ``alone`` (without sources), but each timed network predicted by a model and a map not told of it."""
    rows, networks = pricing.rows, len(fold)
    total, overhead = np.zeros(networks), np.zeros(networks)
    kernel = np.zeros(len(rows.kernel))
    seen, observed = np.zeros(len(rows.kernel)), np.zeros(len(rows.kernel))
    count = int(fold.max()) + 1
    for number in range(count):
        if progress is not None:
            progress(number, count + 1, f"cross-validation: fold {number + 1} of {count}")
        held = fold == number
        model = pricing.model(~held, settings)
        own = held[rows.network]
        further = model.context_ms(rows.network_mb)[rows.network] * rows.weight_mb[rows.kernel]
        kernel[own] = (model.ms(rows.kernels)[rows.kernel] + further)[own]
        seen[own] = kernel[own] + model.profiler_ms
        observed[own] = rows.observed_ms(model.profiler_ms, model.overhead_ms)[own]
        total[held] = np.bincount(rows.network[own], kernel[own], minlength=networks)[held]
        overhead[held] = model.overhead_ms
    predicted = np.zeros(networks)
    for number in range(count):
        held = fold == number
        calibration = _calibration(rows, total, ~held, float(np.median(overhead)))
        predicted[held] = calibration.apply(total[held], rows.nodes[held])
    return replace(
        alone, fold=fold, predicted_ms=predicted, total_ms=total, overhead_ms=overhead, kernel_ms=kernel,
        kernel_seen_ms=seen, kernel_observed_ms=observed,
    )  # fmt: skip


def _stretch(networks: int) -> float:
    """How much wider the interval of so few errors has to be than that of many (Student's t against the normal)."""
    from scipy import stats

    return float(stats.t.ppf(0.95, networks - 1) / stats.norm.ppf(0.95))


def _calibration(rows: Rows, total_ms: np.ndarray, used: np.ndarray, overhead_ms: float) -> Calibration:
    """Networks from kernels; with few networks the map, which was fitted to their totals, is trusted as it is."""
    if used.sum() < _CALIBRATED_FROM:
        return Calibration(1.0, 0.0, overhead_ms)
    return Calibration.fit(total_ms[used], rows.nodes[used], rows.measured_ms[used], overhead_ms)


def choose_networks(
    sources: Sequence[LatencyPredictor | LatencyTable],
    networks: Sequence[Sequence[Kernel]],
    count: int,
    *,
    seed: int | None = None,
) -> np.ndarray:
    """Which networks to time on a new device, (count,) indices, the most telling one first.

    A network's prior is its make-up on the sources: the share of its time in each part of each family.

    Args:
        sources: predictors (or tables) of other devices.
        networks: kernels of the candidates as the new device would run them.
        count: how many to choose.
        seed: None for the best ones; a seed varies the choice.

    Raises:
        InputError: no sources, or fewer candidates than asked for.
    """
    known = _fitted(sources)
    families = sorted({kernel.family for kernels in networks for kernel in kernels})
    number = {family: index for index, family in enumerate(families)}
    distinct = tuple(dict.fromkeys(kernel for kernels in networks for kernel in kernels))
    parts = np.mean([parts_ms(source, distinct) for source in known], axis=0)
    place = {kernel: index for index, kernel in enumerate(distinct)}
    shares = np.zeros((len(networks), len(families) * len(PARTS)))
    for row, kernels in enumerate(networks):
        for kernel, times in Counter(kernels).items():
            start = number[kernel.family] * len(PARTS)
            shares[row, start : start + len(PARTS)] += times * parts[place[kernel]]
    totals = shares.sum(axis=1, keepdims=True)
    # Relative to the network's time: rates common to all parts first, then a family's own, then a network's start.
    shares = shares / np.maximum(totals, 1e-12)
    common = shares.reshape(len(networks), len(families), len(PARTS)).sum(axis=1)
    start = float(np.median(totals)) * 0.02 / np.maximum(totals, 1e-12)
    return choose_rows(np.hstack([common, 0.5 * shares, np.minimum(start, 1.0)]), count, noise=0.003, seed=seed)


def lower_plan(
    session: DeviceSession, plan: SamplingPlan, count: int
) -> list[tuple[PlannedNetwork, tuple[Kernel, ...]]]:
    """The first networks of a plan and their kernels on a device; nothing is timed.

    Raises:
        DeviceJobError: the runtime rejects a network of the plan.
    """
    planned = [plan.network(index) for index in range(count)]
    unique = list({network.id: network for network in planned}.values())
    kernels = session.lower([network.onnx for network in unique], [network.id for network in unique])
    return list(zip(unique, kernels, strict=True))


def time_networks(
    session: DeviceSession,
    networks: Sequence[PlannedNetwork],
    *,
    reference_ms: float,
    noise_floor: float,
    settings: StopwatchSettings = PROFILE,
    visits: int = 1,
    on_error: Callable[[str, HwsearchError], None] | None = None,
) -> LatencyTable:
    """Times these networks, each ``visits`` times, into a table.

    Args:
        session: an open session; a real device holds the timing lock meanwhile.
        networks: to time.
        reference_ms, noise_floor: of the device's check.
        settings: how carefully to time at each visit.
        visits: further visits load the network anew, see ``visits.py``.
        on_error: told of networks that could not be timed, which are left out; without it the error is raised.
    """
    planned = {network.id: network for network in networks}
    known: dict[str, Network] = {}
    made = []
    for visit in range(visits):
        jobs = [(network.id, network.onnx) for network in planned.values()]
        for timing in session.time(jobs, reference_ms=reference_ms, settings=settings, nodes=True, on_error=on_error):
            known[timing.network] = Network(timing.network, planned[timing.network].source, timing.kernels)
            shares = tuple(share for _, share in timing.node_shares)
            made.append(
                Visit(
                    timing.network, f"{visit}", timing.measured_ms, timing.raw_p50_ms, timing.raw_p90_ms,
                    timing.spread, timing.rounds, timing.seconds, shares,
                )
            )  # fmt: skip
    samples = combine(known, made).samples
    return LatencyTable(session.device.name, session.fingerprint, reference_ms, noise_floor, samples)


def transfer_device(
    device: Device | str,
    sources: Sequence[LatencyPredictor | LatencyTable],
    *,
    networks: int = 20,
    candidates: int = 240,
    templates: Sequence[NetworkTemplate] = (),
    seed: int = 0,
    session: DeviceSession | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> tuple[LatencyPredictor, LatencyTable]:
    """Everything: choose networks, time them on the device, fit with the sources' help.

    Args:
        device: the new device or its name; without a ``device.json`` it is checked first.
        sources: predictors (or tables) of other devices.
        networks: how many to time.
        candidates: how many of the plan to choose from; all of them are lowered, and priced when not timed.
        templates: the user's models, whose widths make up half of the plan.
        seed: of the plan.
        session: an open session to use.
        progress: told (steps done, steps, message).
        parameters: of ``LatencyPredictor``.

    Raises:
        InputError: values that make no sense.
        NoisyDeviceError: the device is too noisy.
    """
    if not 1 <= networks <= candidates:
        raise InputError(f"networks is {networks!r}: give 1 to {candidates} to time on the new device")
    known = _fitted(sources)
    device = Device.load(device) if isinstance(device, str) else device
    if session is None:
        with open_session(device) as opened:
            return transfer_device(
                device, known, networks=networks, candidates=candidates, templates=templates, seed=seed,
                session=opened, progress=progress, **parameters,
            )  # fmt: skip
    tell = progress or (lambda done, steps, message: None)
    check = current_check(device, session, lambda text: tell(0, 3, text))
    tell(0, 3, f"lowering {candidates} networks")
    lowered = lower_plan(session, SamplingPlan(seed=seed, templates=tuple(templates)), candidates)
    picked = choose_networks(known, [kernels for _, kernels in lowered], networks)
    tell(1, 3, f"timing {networks} networks")
    table = time_networks(
        session,
        [lowered[index][0] for index in picked],
        reference_ms=check.reference_ms,
        noise_floor=check.noise_floor,
        visits=1 if device.simulated else 3,
        on_error=lambda name, error: tell(1, 3, f"skipped: {error}"),
    )
    timed = {network.id for network in table.networks}
    untimed = [kernels for network, kernels in lowered if network.id not in timed]
    tell(2, 3, "fitting")
    return transfer(known, table, untimed=untimed, **parameters), table


def _fitted(sources: Sequence[LatencyPredictor | LatencyTable]) -> list[LatencyPredictor]:
    if not sources:
        raise InputError("there is no source to transfer from; give predictors or tables of other devices")
    return [LatencyPredictor().fit(source) if isinstance(source, LatencyTable) else source for source in sources]
