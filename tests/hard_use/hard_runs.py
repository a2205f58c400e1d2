"""Run folders that are damaged, of other settings, or in use: over ``run``, ``report``, ``deploy`` and ``estimate``."""

from __future__ import annotations

from pathlib import Path

from hard_case import (
    DEEP,
    DIGITS,
    NOT_UTF8,
    ON_SIMULATED,
    Case,
    Spoil,
    both,
    cut,
    field,
    folder_instead,
    gone,
    link,
    write,
)  # fmt: skip

_FIRST, _DONE = Path("runs/first"), Path("runs/done")
_BOUND = '{"schema": "hwsearch.run", "version": 1, "settings": '
_OPENED = (r"runs/first/(lock|events\.jsonl)",)

#: Folders in which ``run good.toml`` must not go on.
_STOPPED: tuple[tuple[str, Spoil, str], ...] = (
    ("of other settings", write(_FIRST / "config.json", _BOUND + '{"run": {"seed": 7}}}'), "was made with"),
    ("of no settings", write(_FIRST / "config.json", _BOUND + "[]}"), "is damaged"),
    ("of settings in words", write(_FIRST / "config.json", _BOUND + '"x"}'), "is damaged"),
    ("torn", write(_FIRST / "config.json", _BOUND), "is damaged"), ("empty", write(_FIRST / "config.json", ""),
     "damaged"),
    ("of brackets", write(_FIRST / "config.json", DEEP), "is damaged"),
    ("of digits", write(_FIRST / "config.json", DIGITS), "is damaged"),
    ("not UTF-8", write(_FIRST / "config.json", NOT_UTF8), "is damaged"),
    ("a list", write(_FIRST / "config.json", "[]"), "is not of hwsearch.run version 1"),
    ("of another version", write(_FIRST / "config.json", _BOUND.replace("1,", "2,") + "{}}"), "is not of hwsearch.run"),
    ("a folder as settings", folder_instead(_FIRST / "config.json"), "cannot read"),
    ("a folder as lock", folder_instead(_FIRST / "lock"), "cannot write the run folder"),
    ("a lock that is a link to a file of mine", link(_FIRST / "lock", "../../good.toml"),
     "cannot write the run folder"),
    ("a file as state", write(_FIRST / "state", "x"), "cannot write"),
    ("a folder as events", folder_instead(_FIRST / "events.jsonl"), "cannot write"),
    ("a file instead of it", write(_FIRST, "x"), "cannot write the run folder"),
    ("a file above it", both(lambda home: (home / "runs").rename(home / "away"), write("runs", "x")), "cannot write"),
)  # fmt: skip
_FILES = ("config.json", "result.json", "summary.json", "space.json", "explain.json", "events.jsonl")
_DAMAGE: tuple[tuple[str, object], ...] = (
    ("empty", ""), ("brackets", DEEP), ("digits", DIGITS), ("not UTF-8", NOT_UTF8), ("a list", "[]"), ("null", "null"),
    ("a number", "3"), ("half a character", '{"method": "\\ud800", "device": "\\ud800", "name": "\\ud800"}'),
    ("other kinds", '{"groups": 3, "limits": {}, "rows": 3, "layers": [3], "candidates": "x", "widths": [null]}'),
)  # fmt: skip
#: A report reads what is there, and says what is not.
_REPORTED = (r"runs/done/report\.html",)

CASES: tuple[Case, ...] = (
    *(
        Case("run", f"a run folder {name}", ("good.toml",), says, spoil=spoil, writes=(*_OPENED,
            r"runs/first/config\.json"))
        for name, spoil, says in _STOPPED
    ),
    *(
        Case("search", f"a run folder {name}", ("good.toml",), says, spoil=spoil, writes=_OPENED)
        for name, spoil, says in _STOPPED[:6]
    ),
    *(
        Case("report", f"{file} {name}", ("runs/done",), "report written", code=0, result=True, writes=_REPORTED,
             spoil=write(_DONE / file, content))  # type: ignore[arg-type]
        for file in _FILES
        for name, content in _DAMAGE
    ),
    *(
        Case("report", f"{file} as {name}", ("runs/done",), "report written", code=0, result=True, writes=_REPORTED,
             spoil=spoil(_DONE / file))
        for file in _FILES[1:4]
        for name, spoil in (("a folder", folder_instead), ("nothing", gone), ("half of it", lambda p: cut(p, 0.5)))
    ),
    *(
        Case("report", f"{'.'.join(map(str, keys))} = {str(value)[:12]}", ("runs/done",), "report written", code=0,
             result=True, writes=_REPORTED, spoil=field(_DONE / "summary.json", *keys, value=value))
        for keys in (("rows", 0, "measured_ms"), ("rows", 0, "widths"), ("rows", 0, "kernels"), ("rows", 0, "name"),
                     ("metric_name",), ("device",), ("status",))
        for value in (10**400, -1, float("nan"), "x" * 5000, [], None)
    ),
    Case("report", "a checkpoint that is a pickle", ("runs/done",), "report written", code=0, result=True,
         writes=_REPORTED, spoil=write(_DONE / "state/winner/checkpoint.safetensors", b"\x80\x04\x95" + b"\xff" * 200)),
    Case("report", "a checkpoint of an endless header", ("runs/done",), "report written", code=0, result=True,
         writes=_REPORTED, spoil=write(_DONE / "state/winner/checkpoint.safetensors", b"\xff" * 200)),
    Case("deploy", "a run without a network", ("runs/done", *ON_SIMULATED, "--output", "new"), "holds no model.json"),
    Case("estimate", "a run without a network", ("runs/done", *ON_SIMULATED), "holds no model.json"),
    Case("measure", "a run whose network is a file", ("runs/done", *ON_SIMULATED), "holds no model.json",
         spoil=write(_DONE / "model", "x")),
    Case("deploy", "8 bits of a run without settings", ("model", *ON_SIMULATED, "--output", "new", "--precision",
        "int8"),
         "add --data", spoil=write("model/config.json", DEEP)),
)  # fmt: skip
