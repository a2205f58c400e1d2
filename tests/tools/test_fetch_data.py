"""The data fetcher: right files are taken, wrong ones refused, and every source's reason is told."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "fetch_data.py"


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with small stand-in files under their true checksums."""
    spec = importlib.util.spec_from_file_location("fetch_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = {name: hashlib.sha256(name.encode()).hexdigest() for name in module.CONTENT_SHA256}
    monkeypatch.setattr(module, "CONTENT_SHA256", names)
    return module


def publish(folder: Path, names: list[str], *, damage: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.gz").write_bytes(gzip.compress(b"damaged" if name == damage else name.encode()))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "published"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()


def test_the_official_address_is_checked(fetch: ModuleType, server: tuple[str, Path], tmp_path: Path) -> None:
    address, published = server
    target = tmp_path / "data"
    target.mkdir()
    names = list(fetch.CONTENT_SHA256)
    publish(published, names)
    assert fetch.from_address(address, target) == ""
    assert all(fetch.is_right(target / f"{name}.gz", name) for name in names)
    assert not list(target.glob("*.download"))


def test_a_wrong_file_is_refused_and_not_kept(fetch: ModuleType, server: tuple[str, Path], tmp_path: Path) -> None:
    address, published = server
    target = tmp_path / "data"
    target.mkdir()
    names = list(fetch.CONTENT_SHA256)
    publish(published, names, damage=names[1])
    assert "checksum differs" in fetch.from_address(address, target)
    assert not (target / f"{names[1]}.gz").exists()


def test_a_folder_with_a_truncated_file_does_not_count(fetch: ModuleType, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "data"
    target.mkdir()
    names = list(fetch.CONTENT_SHA256)
    publish(source, names)
    (source / f"{names[0]}.gz").write_bytes((source / f"{names[0]}.gz").read_bytes()[:-6])
    assert not fetch.from_folder(source, target)


def test_an_unreachable_address_is_one_reason(fetch: ModuleType, tmp_path: Path) -> None:
    reason = fetch.from_address("http://127.0.0.1:9", tmp_path)
    assert reason.startswith("http://127.0.0.1:9/")
    assert "\n" not in reason
