"""Every verb against malformed input: one clear line, the right exit status, no traceback, and nothing damaged."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import hard_bundles
import hard_configs
import hard_devices
import hard_factories
import hard_models
import hard_options
import hard_runs
import hard_tables
import pytest
from hard_case import Case, damage, snapshot
from running import told

MODULES = (
    hard_options, hard_factories, hard_configs, hard_devices, hard_models, hard_tables, hard_bundles, hard_runs,
)  # fmt: skip
CASES: tuple[Case, ...] = tuple(case for module in MODULES for case in module.CASES)
#: Letters of a line; a person reads it in a terminal.
_LONGEST = 1020
_QUICK, _EVERY = ("run", "search", "device show", "device add", "device list"), 12


def verbs() -> set[str]:
    """Every verb of the command line."""
    from hwsearch.cli import app
    from hwsearch.cli_device import device_app

    def names(typer: object) -> set[str]:
        commands = typer.registered_commands  # type: ignore[attr-defined]
        return {command.name or command.callback.__name__ for command in commands}

    return names(app) | {f"device {name}" for name in names(device_app)}


def brief() -> tuple[Case, ...]:
    """Every second case of the verbs that only read a text, every twelfth of those that load a model."""
    place: Counter[str] = Counter()
    found = []
    for case in CASES:
        if place[case.verb] % (2 if case.verb in _QUICK else _EVERY) == 0:
            found.append(case)
        place[case.verb] += 1
    return tuple(found)


BRIEF = brief()


def test_there_are_enough_cases_of_every_verb() -> None:
    for cases, least, of_a_verb in ((CASES, 1000, 8), (BRIEF, 200, 1)):
        count = Counter(case.verb for case in cases)
        assert set(count) == verbs()
        assert min(count.values()) >= of_a_verb, count
        assert len(cases) >= least
    assert len({case.id for case in CASES}) == len(CASES), [k for k, n in Counter(c.id for c in CASES).items() if n > 1]


@pytest.mark.parametrize("case", BRIEF, ids=lambda case: case.id)
def test_a_malformed_input_is_refused(case: Case, home: Path) -> None:
    refuse(case, home)


@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in CASES if case not in BRIEF], ids=lambda case: case.id)
def test_every_other_malformed_input_is_refused(case: Case, home: Path) -> None:
    refuse(case, home)


def refuse(case: Case, home: Path) -> None:
    """One clear line, the right exit status, nothing damaged; or, of what is odd but works, its result."""
    if case.spoil is not None:
        case.spoil(home)
    before = snapshot(home)
    answer = told(case.verb, case.arguments)
    assert not answer.crash, answer.crash
    assert "Traceback" not in answer.err
    assert answer.code == case.code, (answer.code, answer.err[-600:], answer.out[-600:])
    if case.result:
        assert re.search(case.says, answer.out), answer.out
        assert not answer.lines
    else:
        assert len(answer.lines) == 1, answer.err[-2000:]
        (line,) = answer.lines
        assert answer.err.rstrip("\n").endswith(line), "it is the last thing that is said"
        assert re.search(case.says, line), line
        assert len(line) <= _LONGEST, len(line)
        assert line.isprintable(), line
        assert not answer.out, answer.out
    assert damage(before, snapshot(home), case.writes) == []
