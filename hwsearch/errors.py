"""Every error a user can meet. Each message says what happened, on which value, and what to do.

``HwsearchError`` and its children are the user's to mend; the command line prints them as one line and exits with
``exit_code``. ``InternalError`` is a bug in hwsearch and deliberately not a child: it must never be caught with them.
"""

from __future__ import annotations


class HwsearchError(Exception):
    """Base of all errors that a user can mend."""

    exit_code = 2


class InputError(HwsearchError):
    """A value, file or model that the user gave cannot be used (exit status 2)."""


class SchemaError(InputError):
    """A file is not what its name or manifest says: wrong schema, wrong version, damaged or truncated."""


class UnsupportedModelError(InputError):
    """A model that cannot be captured, exported or changed; the message names the operation."""


class AnswerIsNo(HwsearchError):
    """The work was done and the answer is no (exit status 1)."""

    exit_code = 1


class InfeasibleBudgetError(AnswerIsNo):
    """A budget that no network of the space can keep; carries the smallest reachable milliseconds."""

    def __init__(self, message: str, *, smallest_ms: float) -> None:
        super().__init__(message)
        self.smallest_ms = smallest_ms


class NoisyDeviceError(AnswerIsNo):
    """The device gave too few samples at its reference speed: it is busy, throttled, or another machine."""


class CheckFailedError(AnswerIsNo):
    """A fold, an export or a bundle does not compute what it should."""


class DeviceJobError(HwsearchError):
    """One job on a device failed (the runtime rejected or crashed on a network); the device goes on."""


class DeviceUnavailableError(HwsearchError):
    """The device itself cannot be used now: out of reach, login refused, no Python there, its disk is full.

    Nothing that was finished is lost; once it is mended the same command goes on.
    """


class InternalError(Exception):
    """A broken promise inside hwsearch: a bug to report, never the user's mistake."""
