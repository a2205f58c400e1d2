"""``Verdict``: does a deployed network compute what it should, and inside its budget? The rules, without a device.

Standard library and numpy only: the same rules judge on a board.
"""

from __future__ import annotations

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
    where nothing was timed or promised; ``noise_floor`` is the device's relative test-retest error.
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
            raise InputError(f"cannot write {target} ({error.strerror}): choose a writable folder") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Verdict:
        """Read what ``save`` wrote. Raises SchemaError naming the file when it is missing or something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if (data["schema"], data["version"]) != (SCHEMA, VERSION) or data["status"] not in STATUSES:
                raise SchemaError(f"{path} is no verdict of version {VERSION}: verify the bundle again")
            known = {f.name: data[f.name] for f in fields(cls)}
            found = data["numerics"]
            absolute, relative, allowed = (
                math.inf if found[key] is None else float(found[key])
                for key in ("max_abs_error", "max_relative_error", "allowed")
            )
            numerics = Numerics(bool(found["ok"]), absolute, relative, allowed, int(found["cases"]))
            lists = {key: tuple(map(str, known[key])) for key in ("reasons", "notes")}
            return cls(**{**known, **lists, "numerics": numerics})
        except OSError as error:
            raise SchemaError(f"{path} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SchemaError(f"{path} is damaged ({error!r}): verify the bundle again") from error


def compare(pairs: list[tuple[np.ndarray, np.ndarray]], relative: float, absolute: float) -> Numerics:
    """Golden outputs against a runtime's: (golden, got) pairs. A case passes when
    ``max|got - golden| <= absolute + relative * max|golden|``; a wrong shape or NaN never does."""
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
    ok = all(error <= limit for error, limit in zip(errors, allowed, strict=True))
    return Numerics(ok, max(errors), max(ratios), allowed[worst], len(pairs))


def judge(
    numerics: Numerics,
    budget_ms: float | None,
    measured_ms: float | None,
    raw_p50_ms: float | None,
    raw_noise_floor: float,
) -> tuple[str, tuple[str, ...]]:
    """(status, reasons). Pass: numerics hold, ``measured_ms`` is within the budget, and the raw median is within the
    budget times (1 + the noise floor of raw medians). The raw median alone too high makes it conditional: the machine
    is slower now than at its reference speed."""
    reasons = []
    if not numerics.ok:
        reasons.append(
            f"outputs differ from the golden ones by {numerics.max_abs_error:.3g}, {numerics.allowed:.3g} is allowed"
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
