"""Writes the unseen networks: published families as ONNX files, on which no predictor may be fitted or tuned.

    python tools/unseen_networks.py --output unseen                     all of them (about ten minutes)
    python tools/unseen_networks.py --output unseen --only resnet       one family
    python tools/unseen_networks.py --list                              what there is; nothing is built

One file per network: batch 1, float32, batch norm folded, random weights from a fixed seed. ``manifest.json`` beside
them says family, source, input shape, MACs, parameters and a hash of the graph's structure. Each structure is compared
with the committed ``tools/unseen/list.json``; exit status 1 when one differs. Run it again after an interruption:
networks whose file is there and whole are skipped. It needs hwsearch and nothing else: the families are written in
``tools/unseen/`` from their papers, so that no library's release changes the list. ``--update-list`` is for a new
version of the exporter, whose graphs may differ; what is in the list must never follow from what a predictor can do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import zlib
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from hwsearch.errors import HwsearchError, InputError, SchemaError
    from hwsearch.latency.table import read_manifest
    from hwsearch.search.journal import write_atomic
except ModuleNotFoundError as error:
    hint = "run tools/setup, then use .venv/bin/python"
    print(f"unseen_networks: error: {error.name} is not installed; {hint}", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from unseen.catalogue import Entry

SCHEMA = "hwsearch-unseen-networks"
VERSION = 1
LIST = Path(__file__).resolve().parent / "unseen" / "list.json"
PACKAGES = ("torch", "onnx", "onnxscript")


def build(entry: Entry) -> tuple[bytes, dict[str, Any]]:
    """A network's ONNX bytes and its line of the manifest.

    Raises:
        HwsearchError: it cannot be exported, or does not run as it should.
    """
    import onnx
    import torch
    from unseen.pack import check_runs, count_macs, give_weights, structure_sha256

    from hwsearch.graph.onnx_export import export_onnx
    from hwsearch.reparam.fold import fold

    with torch.device("meta"):
        macs, parameters = count_macs(entry.make(), entry.input_shape)
    model = entry.make()
    # One seed per name: adding a network changes no other.
    give_weights(model, entry.input_shape, zlib.crc32(entry.name.encode()))
    example = torch.randn(entry.input_shape, generator=torch.Generator().manual_seed(0))
    data = export_onnx(fold(model, example, require=False), example)
    check_runs(entry.name, data, entry.input_shape)
    line = {
        "family": entry.family,
        "name": entry.name,
        "beyond_cnn_kernels": entry.beyond,
        "input_shape": list(entry.input_shape),
        "macs": macs,
        "published_mmacs": entry.published_mmacs,
        "parameters": parameters,
        "source": entry.source,
        "structure_sha256": structure_sha256(onnx.load_from_string(data)),
    }
    return data, line


def write_all(entries: list[Entry], folder: Path) -> list[dict[str, Any]]:
    """Write what is missing in ``folder``, one progress line each; the lines of the manifest for ``entries``.

    Raises:
        HwsearchError: the folder cannot be written, its manifest is damaged, or a network fails.
    """
    path = folder / "manifest.json"
    lines: dict[str, dict[str, Any]] = {}
    if path.exists():
        from unseen.catalogue import CATALOGUE

        listed = {entry.name for entry in CATALOGUE}
        lines = {line["name"]: line for line in read_lines(path) if line["name"] in listed}
    for number, entry in enumerate(entries, 1):
        file = folder / f"{entry.name}.onnx"
        if is_whole(file, lines.get(entry.name)):
            state = "is there"
        else:
            data, line = build(entry)
            write_atomic(file, data)
            lines[entry.name] = {**line, "file": file.name, "file_sha256": hashlib.sha256(data).hexdigest()}
            write_atomic(path, manifest_text(list(lines.values())))
            state = "written"
        line = lines[entry.name]
        print(
            f"[{number}/{len(entries)}] {entry.family} {entry.name}: {line['macs'] / 1e6:.1f} MMACs, "
            f"{line['parameters'] / 1e6:.2f} M parameters, {state}",
            file=sys.stderr,
            flush=True,
        )
    return [lines[entry.name] for entry in entries]


def is_whole(file: Path, line: dict[str, Any] | None) -> bool:
    """Whether a network's file is there, and holds what the manifest says."""
    try:
        return line is not None and hashlib.sha256(file.read_bytes()).hexdigest() == line["file_sha256"]
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; choose another --output") from error


def manifest_text(lines: list[dict[str, Any]]) -> str:
    """The manifest: sorted by family and name, with the packages that shape an export."""
    made_with = {package: metadata.version(package) for package in PACKAGES}
    lines = sorted(lines, key=lambda line: (line["beyond_cnn_kernels"], line["family"], line["name"]))
    facts = {"schema": SCHEMA, "version": VERSION, "made_with": made_with, "networks": lines}
    return json.dumps(facts, indent=1) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The networks of a manifest, or of the committed list.

    Raises:
        SchemaError: the file is damaged or another one.
    """
    manifest = read_manifest(path, SCHEMA, VERSION, "list of unseen networks", "delete it, or choose another --output")
    networks = manifest.get("networks")
    needed = {"name", "family", "macs", "parameters", "structure_sha256", "beyond_cnn_kernels"}
    if not isinstance(networks, list) or not all(isinstance(line, dict) and needed <= line.keys() for line in networks):
        raise SchemaError(f"{path}: its networks are not what this tool writes; delete it, or choose another --output")
    return networks


def unlike_the_list(lines: list[dict[str, Any]]) -> list[str]:
    """Names of networks whose structure is not the committed one."""
    listed = {line["name"]: line["structure_sha256"] for line in read_lines(LIST)} if LIST.exists() else {}
    return [line["name"] for line in lines if listed.get(line["name"]) != line["structure_sha256"]]


def chosen(only: list[str] | None) -> list[Entry]:
    """The entries of the families asked for, all by default.

    Raises:
        InputError: there is no such family.
    """
    from unseen.catalogue import CATALOGUE

    families = list(dict.fromkeys(entry.family for entry in CATALOGUE))
    for family in only or []:
        if family not in families:
            raise InputError(f"there is no family {family!r}: choose from {', '.join(families)}")
    return [entry for entry in CATALOGUE if not only or entry.family in only]


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for; the exit status."""
    entries = chosen(arguments.only)
    if arguments.list:
        for entry in entries:
            size = "x".join(map(str, entry.input_shape))
            print(f"{entry.family:14} {entry.name:32} {size:14} {entry.source}")
        return 0
    if arguments.output is None:
        raise InputError("no folder to write to: add --output FOLDER, or --list to see what there is")
    if arguments.update_list and arguments.only:
        raise InputError("the list is made from all families: leave --only out")
    lines = write_all(entries, arguments.output)
    if arguments.update_list:
        # Weights may differ in their last bits from machine to machine; structures may not.
        own = ("file", "file_sha256")
        write_atomic(LIST, manifest_text([{k: v for k, v in line.items() if k not in own} for line in lines]))
    unlike = unlike_the_list(lines)
    total = sum(line["macs"] for line in lines)
    families = len({line["family"] for line in lines})
    if arguments.json:
        manifest = str(arguments.output / "manifest.json")
        facts = {"networks": len(lines), "families": families, "macs": total, "unlike_the_list": unlike}
        print(json.dumps({**facts, "manifest": manifest}))
    else:
        print(f"{len(lines)} networks of {families} families, {total / 1e9:.2f} GMACs, in {arguments.output}")
    if unlike:
        versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
        print(
            f"unseen_networks: {len(unlike)} of {len(lines)} graphs are not those of {LIST.name} "
            f"({', '.join(unlike[:3])}); this is {versions}: install the versions of constraints.txt",
            file=sys.stderr,
        )
    return 1 if unlike else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; one line and exit status 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="unseen_networks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the ONNX files and manifest.json go")
    parser.add_argument("--only", action="append", metavar="FAMILY", help="this family alone; may be repeated")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--update-list", action="store_true", help="make the committed list anew (a new exporter)")
    parser.add_argument("--list", action="store_true", help="print the list and build nothing")
    try:
        return run(parser.parse_args(argv))
    except HwsearchError as error:
        print(f"unseen_networks: error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
