#!/usr/bin/env python
"""Puts a device's table into the repository under a name that tells the machine, with a predictor fitted to it.

    python tools/publish_table.py --device x86-ort-1t --name amd-epyc-ort-1t

A published table keeps out of the way of a device that everybody profiles for themselves (``x86-ort-1t`` is another
machine for everyone), and stays what it is: nobody profiles under its name. It serves estimates on machines with the
same CPU and runtime, and ``hwsearch fit --from`` on all others. Reads ``latency_tables/DEVICE`` in ``HWSEARCH_HOME``;
writes ``devices/NAME.toml`` and ``latency_tables/NAME/`` (table, device check, predictor, error card) in ``--output``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ending import leave

from hwsearch.console import Console
from hwsearch.device.check import DeviceCheck
from hwsearch.device.spec import Device
from hwsearch.latency.table import LatencyTable
from hwsearch.preparation import fit_table


def publish(source: Device, name: str, output: Path, console: Console) -> Path:
    """The folder of the published table."""
    table = replace(LatencyTable.load(source.table_folder), device=name)
    check = DeviceCheck.load(source.table_folder)
    device = replace(source, name=name, home=output)
    table.save(device.table_folder)
    replace(check, device=name).save(device.table_folder)
    machine = table.fingerprint
    text = (source.home / "devices" / f"{source.name}.toml").read_text(encoding="utf-8")
    (output / "devices").mkdir(parents=True, exist_ok=True)
    (output / "devices" / f"{name}.toml").write_text(
        f"# A published table: {machine.cpu}, {machine.isa}, {machine.runtime} {machine.runtime_version}, "
        f"{len(table.networks)} networks.\n# To profile a CPU of your own, take {source.name}.\n{text}",
        encoding="utf-8",
    )
    fit_table(device, table, console)
    return device.table_folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent)
    options = parser.parse_args()
    print(publish(Device.load(options.device), options.name, options.output, Console()))
    return 0


if __name__ == "__main__":
    leave(main)
