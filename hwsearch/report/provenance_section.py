"""Where a run's numbers come from: device, releases, data, files, settings, and how long every stage took."""

from __future__ import annotations

from typing import Any

from hwsearch.report.page import absent, definitions, details, ms, panel, percent, table, text
from hwsearch.report.run_data import RunData
from hwsearch.report.values import mapping, positive, word

_MOST_STAGES, _MOST_SETTINGS = 20, 400
#: Of the first line of a run: what it was made with, as shown to people.
_MADE_WITH = (("hwsearch", "hwsearch"), ("torch", "PyTorch"), ("python", "Python"), ("data", "training data"))


def provenance_section(run: RunData) -> str:
    """A list of names and values, all settings, and what could not be read."""
    pairs: list[tuple[str, Any]] = [("run folder", run.folder)]
    pairs += [(key, run.result[key]) for key in ("method", "seed") if run.result.get(key) is not None]
    pairs += [(shown, value) for key, shown in _MADE_WITH if (value := word(run.started.get(key)))]
    pairs += [(key.replace("_", " "), value) for key, value in mapping(run.manifest.get("fingerprint")).items()]
    for key, name in (("reference_ms", "device's reference speed"), ("noise_floor", "device's noise floor")):
        known = positive(run.manifest.get(key))
        if known is not None:
            pairs.append((name, f"{ms(known)} ms for its canary" if key == "reference_ms" else percent(known)))
    model = mapping(mapping(run.manifest.get("files")).get("model.onnx"))
    if model:
        pairs.append(("model.onnx", f"sha256 {model.get('sha256')}"))
    pairs += [(f"took: {name}", f"{seconds:,.1f} s") for name, seconds in run.seconds[:_MOST_STAGES]]
    content = definitions((str(key), value) for key, value in pairs)
    if run.settings:
        rows = [[text(name), text(value)] for name, value in sorted(_flat(run.settings))[:_MOST_SETTINGS]]
        content += details("All settings", table(["setting", "value"], rows))
    content += "".join(absent(f"Left out: {problem}") for problem in run.problems)
    note = (
        "The reference speed is what a small fixed network, the canary, takes on the undisturbed device: measured "
        "milliseconds are told at this speed. The noise floor is how far two measurements of one network lie apart, at "
        "most, in 95 of 100 cases."
    )
    return panel("Provenance", note if run.manifest else "", content)


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            found += _flat(item, f"{prefix}{key}.")
        elif item is not None:  # a setting that was left out says nothing
            found.append((f"{prefix}{key}", str(item)[:200]))
    return found
