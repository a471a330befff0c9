"""Downloads, from a server on this machine: checked by hash, done once, pinned where nobody publishes a hash."""

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import download
import pytest

from hyperdp_lib import data_sets
from hyperdp_lib.data import InputError
from hyperdp_lib.public import originals
from hyperdp_lib.public.originals import ORIGINALS, Original, fetch


class Quiet(SimpleHTTPRequestHandler):
    requested: list[str] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.requested.append(self.path)
        super().do_GET()


@pytest.fixture
def server(tmp_path):
    """A folder that is served, its address, and the list of what was asked for."""
    folder = tmp_path / "served"
    folder.mkdir()
    Quiet.requested = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_address[1]}", Quiet.requested
        running.shutdown()


def md5(content):
    return f"md5:{hashlib.md5(content).hexdigest()}"


def test_a_file_is_downloaded_once(server, tmp_path):
    folder, address, requested = server
    (folder / "a.gz").write_bytes(b"right")
    original = Original("a.gz", (f"{address}/a.gz",), md5(b"right"))
    for _ in range(2):
        path, on_trust = fetch(original, tmp_path / "here")
        assert path.read_bytes() == b"right" and not on_trust
    assert requested == ["/a.gz"]
    path.write_bytes(b"damaged")  # noticed, and fetched again
    assert fetch(original, tmp_path / "here")[0].read_bytes() == b"right"
    assert not (tmp_path / "here" / originals.REGISTRY).exists()


def test_a_mirror_is_tried_when_the_first_place_fails(server, tmp_path):
    folder, address, requested = server
    (folder / "wrong").write_bytes(b"wrong")
    (folder / "a").write_bytes(b"right")
    places = tuple(f"{address}/{name}" for name in ("gone", "wrong", "a"))
    assert fetch(Original("a", places, md5(b"right")), tmp_path)[0].read_bytes() == b"right"
    assert requested == ["/gone", "/wrong", "/a"]


def test_a_wrong_file_is_refused_and_not_left_behind(server, tmp_path):
    folder, address, _ = server
    (folder / "a").write_bytes(b"forged")
    with pytest.raises(InputError, match="checksum is not the expected one.*put the right file at") as caught:
        fetch(Original("a", (f"{address}/a",), md5(b"right")), tmp_path / "here")
    assert "\n" not in str(caught.value) and list((tmp_path / "here").iterdir()) == []


def test_a_wrong_file_at_the_place_is_named_with_the_hash_it_should_have(tmp_path):
    (tmp_path / "a").write_bytes(b"wrong")
    with pytest.raises(InputError, match=f"a' is not the right file, its md5 should be {md5(b'right')[4:]}"):
        fetch(Original("a", ("http://127.0.0.1:9/a",), md5(b"right")), tmp_path)


def test_a_file_without_published_hash_is_trusted_once_only(server, tmp_path):
    folder, address, _ = server
    (folder / "a").write_bytes(b"first")
    original, here = Original("a", (f"{address}/a",)), tmp_path / "here"
    assert fetch(original, here)[1] is True
    assert originals.read_registry(here) == {"a": f"sha256:{hashlib.sha256(b'first').hexdigest()}"}
    assert fetch(original, here)[1] is False
    (here / "a").unlink()
    (folder / "a").write_bytes(b"second")  # the source changed, or somebody changed it
    with pytest.raises(InputError, match="checksum"):
        fetch(original, here)


def test_a_broken_registry_is_refused(tmp_path):
    (tmp_path / originals.REGISTRY).write_text("no hash\nkkanji.tar\n")
    with pytest.raises(InputError, match="FILE sha256:HASH"):
        originals.read_registry(tmp_path)


def test_the_script_says_what_was_trusted(server, tmp_path, monkeypatch, capsys):
    folder, address, _ = server
    for name in ("a", "b"):
        (folder / name).write_bytes(b"right")
    table = {"both": (Original("a", (f"{address}/a",), md5(b"right")), Original("b", (f"{address}/b",)))}
    monkeypatch.setattr(download, "ORIGINALS", table)
    assert download.main(["both", "--dest", str(tmp_path / "new")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "md5:" in first and "TRUSTED ON FIRST USE" in second
    assert download.main(["all", "--dest", str(tmp_path / "new")]) == 0
    assert "TRUSTED" not in capsys.readouterr().out
    (folder / "a").unlink()
    assert download.main(["both", "--dest", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_data_set_outside_the_library_has_originals():
    made_of = {name.removesuffix("-jpeg") for name in data_sets.DATA_SETS}
    assert made_of == set(ORIGINALS)
    every = [original for several in ORIGINALS.values() for original in several]
    assert len({original.file for original in every}) == len(every)  # they share one folder
    unpublished = {original.file.split("-")[0] for original in every if original.known_hash is None}
    assert unpublished == {"kkanji.tar", "quickdraw"}
    assert not any("python" in url for original in every for url in original.urls if "cifar" in url)  # pickles
