"""``Verdict``: does a deployed network compute what it should, and inside its budget? The rules, without a device.

Standard library and numpy only: the same rules judge on a board.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from hwsearch.errors import InputError, SchemaError

SCHEMA, VERSION = "hwsearch.verdict", 1
STATUSES = ("pass", "conditional", "fail")
_TIMES = (
    "budget_ms", "predicted_ms", "measured_ms", "raw_p50_ms", "raw_p90_ms", "spread", "noise_floor", "sqnr_db",
    "promised_sqnr_db",
)  # fmt: skip
#: Fields that verdicts of earlier releases lack.
_ADDED = ("precision", "sqnr_db", "promised_sqnr_db")
#: Decibels of what cannot be told apart.
_EXACT_DB = 200.0


@dataclass(frozen=True, slots=True)
class Numerics:
    """Largest error over all golden cases; relative to the largest golden output of the case. ``allowed`` is absolute,
    for the worst case."""

    ok: bool
    max_abs_error: float
    max_relative_error: float
    allowed: float
    cases: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ``verify`` found.

    ``status`` is "pass", "conditional" (inside the budget at the device's reference speed, but not as the clock saw it
    now) or "fail"; ``reasons`` says why it is no pass, ``notes`` what else a reader should know. Milliseconds are None
    where nothing was timed or promised; ``noise_floor`` is the device's relative test-retest error. ``sqnr_db`` is what
    an 8-bit network leaves of the float one's output on the golden cases, ``promised_sqnr_db`` what it must leave.
    """

    status: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    name: str
    device: str
    numerics: Numerics
    budget_ms: float | None = None
    predicted_ms: float | None = None
    measured_ms: float | None = None
    raw_p50_ms: float | None = None
    raw_p90_ms: float | None = None
    spread: float | None = None
    rounds: int | None = None
    noise_floor: float | None = None
    precision: str = "float32"
    sqnr_db: float | None = None
    promised_sqnr_db: float | None = None

    @property
    def exit_code(self) -> int:
        """0 for a pass, else 1."""
        return 0 if self.status == "pass" else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types with schema and version; a number that is not finite becomes null."""
        plain = asdict(self)
        for values in (plain, plain["numerics"]):
            for key, value in values.items():
                if isinstance(value, float) and not math.isfinite(value):
                    values[key] = None
        return {"schema": SCHEMA, "version": VERSION, **plain, "exit_code": self.exit_code}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, in one step. Raises InputError when the file cannot be written."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, sort_keys=True, allow_nan=False) + "\n")
            temporary.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise InputError(f"cannot write {target} ({error.strerror}): choose a writable folder") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Verdict:
        """Read what ``save`` wrote. Raises SchemaError naming the file when it is missing or something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if (data["schema"], data["version"]) != (SCHEMA, VERSION) or data["status"] not in STATUSES:
                raise SchemaError(f"{path} is no verdict of version {VERSION}: verify the bundle again")
            known = {f.name: data[f.name] for f in fields(cls) if f.name in data or f.name not in _ADDED}
            found = data["numerics"]
            absolute, relative, allowed = (
                math.inf if found[key] is None else float(found[key])
                for key in ("max_abs_error", "max_relative_error", "allowed")
            )
            numerics = Numerics(bool(found["ok"]), absolute, relative, allowed, int(found["cases"]))
            lists = {key: tuple(map(str, known[key])) for key in ("reasons", "notes")}
            for name in (*_TIMES, "rounds"):
                value = known.get(name)
                if value is not None and (isinstance(value, bool) or not -1e300 <= value <= 1e300):
                    raise ValueError(f"{name} is no number")
            if not all(isinstance(known.get(name, ""), str) for name in ("name", "device", "precision")):
                raise TypeError("a name is no text")
            return cls(**{**known, **lists, "numerics": numerics})
        except OSError as error:
            raise SchemaError(f"{path} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise SchemaError(f"{path} is damaged ({error!r}): verify the bundle again") from error


def compare(pairs: list[tuple[np.ndarray, np.ndarray]], relative: float, absolute: float) -> Numerics:
    """Golden outputs against a runtime's: (golden, got) pairs. A case passes when
    ``max|got - golden| <= absolute + relative * max|golden|``; a wrong shape, or a number that is not finite on either
    side, never does."""
    allowed, errors, ratios = [], [], []
    for golden, got in pairs:
        scale = float(np.abs(golden.astype(np.float64)).max(initial=0.0))
        error = math.inf
        if golden.shape == got.shape:
            error = float(np.abs(got.astype(np.float64) - golden.astype(np.float64)).max(initial=0.0))
        errors.append(error if math.isfinite(error) else math.inf)
        ratios.append(errors[-1] / scale if scale else (0.0 if error == 0 else math.inf))
        allowed.append(absolute + relative * scale)
    worst = max(range(len(pairs)), key=lambda i: errors[i] / max(allowed[i], 1e-300))
    # of golden outputs that are not finite anything would be within the tolerance
    ok = all(math.isfinite(limit) and error <= limit for error, limit in zip(errors, allowed, strict=True))
    return Numerics(ok, max(errors), max(ratios), allowed[worst], len(pairs))


def sqnr_db(signal: np.ndarray, got: np.ndarray) -> float:
    """Signal to quantisation noise: ``10 log10(sum signal^2 / sum (signal - got)^2)``, -200 to 200 dB; arrays of one
    shape. A value that is not finite is all noise.

    Example:
        >>> sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 3.5]))
        20.0
    """
    exact = signal.astype(np.float64)
    if signal.shape != got.shape:
        return -_EXACT_DB
    noise = float(np.square(exact - got.astype(np.float64)).sum())
    power = float(np.square(exact).sum())
    if not math.isfinite(noise) or not math.isfinite(power):
        return -_EXACT_DB
    if noise == 0:
        return _EXACT_DB
    ratio = max(power / noise, 10 ** (-_EXACT_DB / 10))
    return min(10 * math.log10(ratio), _EXACT_DB)


def judge(
    numerics: Numerics,
    budget_ms: float | None,
    measured_ms: float | None,
    raw_p50_ms: float | None,
    raw_noise_floor: float,
    *,
    sqnr: float | None = None,
    promised_sqnr: float | None = None,
) -> tuple[str, tuple[str, ...]]:
    """(status, reasons). Pass: numerics hold, ``measured_ms`` is within the budget, and the raw median is within the
    budget times (1 + the noise floor of raw medians). The raw median alone too high makes it conditional: the machine
    is slower now than at its reference speed."""
    reasons = []
    if not numerics.ok:
        reasons.append(
            f"outputs differ from the golden ones by {numerics.max_abs_error:.3g}, {numerics.allowed:.3g} is allowed"
        )
    if sqnr is not None and promised_sqnr is not None and not sqnr >= promised_sqnr:
        reasons.append(
            f"8 bits leave {sqnr:.1f} dB of the float network's output here, {promised_sqnr:.1f} dB are promised"
        )
    if budget_ms is None or measured_ms is None or raw_p50_ms is None:
        return ("fail" if reasons else "pass"), tuple(reasons)
    if not measured_ms <= budget_ms:
        over = (measured_ms / budget_ms - 1) * 100
        reasons.append(f"measured {measured_ms:.4g} ms is above the budget of {budget_ms:.4g} ms by {over:.2g} %")
    if reasons:
        return "fail", tuple(reasons)
    limit = budget_ms * (1 + raw_noise_floor)
    if not raw_p50_ms <= limit:
        reason = (
            f"the raw median of {raw_p50_ms:.4g} ms is above {limit:.4g} ms, the budget and what raw medians scatter "
            f"({raw_noise_floor * 100:.2g} %): the machine is slower now than at its reference speed"
        )
        return "conditional", (reason,)
    return "pass", ()
