"""Fetches Fashion-MNIST into data/fashion-mnist: from Debian's package where apt is there, else its official address.

Every file is checked against the checksum of its decompressed content (the compressed bytes differ between sources).
The standard library is all it needs. Run it again at any time: files that are there and right are left alone.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

CONTENT_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
OFFICIAL_ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
TIMEOUT_S = 60


def is_right(path: Path, name: str) -> bool:
    """True when the gzip file holds exactly the published content."""
    try:
        with gzip.open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest() == CONTENT_SHA256[name]
    except (OSError, EOFError):
        return False


def take(source: Path, target: Path, name: str) -> bool:
    """Copies a right file into place in one step; a wrong one is left where it is."""
    if not source.is_file() or not is_right(source, name):
        return False
    partial = target.with_suffix(".partial")
    shutil.copyfile(source, partial)
    os.replace(partial, target)
    return True


def from_folder(source: Path, folder: Path) -> bool:
    """Takes all four files from a folder; True when all are there."""
    return all(take(source / f"{name}.gz", folder / f"{name}.gz", name) for name in CONTENT_SHA256)


def from_apt(folder: Path) -> str:
    """Downloads and unpacks Debian's package without installing it; returns why not, or an empty string."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return "no apt-get here"
    with tempfile.TemporaryDirectory() as scratch:
        commands = [["apt-get", "download", "-qq", DEBIAN_PACKAGE]]
        if os.geteuid() == 0:
            # Package lists may be missing on a fresh machine; only root may refresh them.
            commands = [*commands, ["apt-get", "update", "-qq"], *commands]
        error = ""
        for command in commands:
            if any(Path(scratch).glob("*.deb")):
                break
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
            error = (done.stderr.strip().splitlines() or [""])[-1] if done.returncode else ""
        packages = list(Path(scratch).glob("*.deb"))
        if not packages:
            return f"apt-get could not download {DEBIAN_PACKAGE}: {error}"
        subprocess.run(["dpkg-deb", "-x", str(packages[0]), scratch], check=True)
        found = from_folder(Path(scratch) / DEBIAN_FOLDER.relative_to("/"), folder)
        return "" if found else f"{DEBIAN_PACKAGE} does not hold the published files"


def from_address(address: str, folder: Path) -> str:
    """Downloads the official files; returns why not, or an empty string."""
    for name in CONTENT_SHA256:
        target = folder / f"{name}.gz"
        if is_right(target, name):
            continue
        url = f"{address}/{name}.gz"
        partial = target.with_suffix(".download")
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as reply, partial.open("wb") as file:
                shutil.copyfileobj(reply, file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            return f"{url}: {error}"
        right = take(partial, target, name)
        partial.unlink(missing_ok=True)
        if not right:
            return f"{url}: what arrived is not the published file (checksum differs)"
    return ""


def main() -> int:
    """Fills data/fashion-mnist; exit status 2 with one clear line when no source has the files."""
    folder = Path(__file__).resolve().parent.parent / "data" / "fashion-mnist"
    folder.mkdir(parents=True, exist_ok=True)
    if all(is_right(folder / f"{name}.gz", name) for name in CONTENT_SHA256) or from_folder(DEBIAN_FOLDER, folder):
        return 0
    print("setup: fetching Fashion-MNIST", file=sys.stderr)
    reasons = []
    address = os.environ.get("HWSEARCH_FASHION_MNIST_ADDRESS", OFFICIAL_ADDRESS)
    for source, attempt in (("Debian", lambda: from_apt(folder)), ("official", lambda: from_address(address, folder))):
        reason = attempt()
        if not reason:
            return 0
        reasons.append(f"{source}: {reason}")
    print(
        f"setup: error: Fashion-MNIST could not be had ({'; '.join(reasons)}). "
        f"Put the four idx.gz files into {folder} and run again.",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
