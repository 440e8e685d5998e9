"""Names of the hub, on a hub of our own: a server on loopback that has one model."""

import contextlib
import hashlib
import http.server
import json
import shutil
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distilcb.config import DEFAULT_RECIPE
from distilcb.errors import DataError, ModelError
from distilcb.hub import HubDataset, model_folder

TEACHER = DEFAULT_RECIPE.parent / "mini" / "teacher"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "almanach/camembert-base"


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks for to fetch a model; files that were sent are noted."""

    folder: Path
    sent: list[str]

    def do_HEAD(self):
        self._answer(send=False)

    def do_GET(self):
        self._answer(send=True)

    def log_message(self, *_):
        pass

    def _answer(self, *, send):
        path = self.path.split("?")[0]
        files = {str(file.relative_to(self.folder)): file for file in self.folder.rglob("*") if file.is_file()}
        if path.startswith(f"/api/models/{NAME}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _sha1(file.read_bytes())}
                for name, file in files.items()
            ]
            self._send(json.dumps(entries).encode(), "application/json", send)
        elif path.startswith(f"/api/models/{NAME}"):
            names = [{"rfilename": name} for name in files]
            facts = {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": names, "tags": [], "private": False}
            self._send(json.dumps(facts).encode(), "application/json", send)
        elif path.startswith(f"/{NAME}/resolve/") and (file := self.folder / path.split("/", 5)[5]).is_file():
            if send:
                self.sent.append(file.name)
            self._send(file.read_bytes(), "application/octet-stream", send)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    def _send(self, content, kind, send):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{_sha1(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if send:
            self.wfile.write(content)


def _sha1(content):
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(tmp_path):
    """A running hub: its address, the model's folder there, the files that were sent."""
    folder = tmp_path / "on_the_hub"
    shutil.copytree(TEACHER, folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "tf_model.h5").write_bytes(b"for another framework")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    handler = type("ThisHub", (Hub,), {"folder": folder, "sent": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder, handler.sent
        server.shutdown()
        thread.join()


def ask(name, address, cache, *, pickle=False):
    """model_folder in a process of its own: huggingface_hub reads its settings when it is imported."""
    code = (
        "import sys; from distilcb.hub import model_folder; print(model_folder(sys.argv[1], pickle=bool(sys.argv[2])))"
    )
    words = [sys.executable, "-c", code, name, "yes" if pickle else ""]
    environ = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "PATH": "/usr/bin:/bin"}
    return subprocess.run(words, env=environ, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("pickle", [False, True])
def test_a_model_of_the_hub_is_fetched_once_without_what_it_does_not_need(hub, tmp_path, pickle):
    address, folder, sent = hub
    first = ask(NAME, address, tmp_path / "cache", pickle=pickle)
    assert first.returncode == 0, first.stderr
    fetched = Path(first.stdout.splitlines()[-1])
    needed = {file.name for file in TEACHER.iterdir() if file.suffix != ".md"} | (
        {"pytorch_model.bin"} if pickle else set()
    )
    assert {file.name for file in fetched.iterdir()} == needed
    assert (fetched / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sorted(sent) == sorted(needed)
    again = ask(NAME, address, tmp_path / "cache", pickle=pickle)
    assert again.stdout == first.stdout
    assert sorted(sent) == sorted(needed)


def test_without_network_the_cache_serves(hub, tmp_path):
    address, _, _ = hub
    first = ask(NAME, address, tmp_path / "cache")
    nowhere = ask(NAME, "http://127.0.0.1:9", tmp_path / "cache")
    assert nowhere.returncode == 0, nowhere.stderr
    assert nowhere.stdout == first.stdout


@contextlib.contextmanager
def broken_network(kind):
    """An address that takes connections, and then answers nothing or cuts them."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            if kind == "silent":
                over.wait(60)

    over = threading.Event()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        over.set()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["silent", "cut off", "no address"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_broken_network_is_as_good_as_none(hub, tmp_path, kind, cached):
    cache = tmp_path / "cache"
    whole = ask(NAME, hub[0], cache) if cached else None
    started = time.monotonic()
    with broken_network(kind) as address:
        ended = ask(NAME, "hub.local" if kind == "no address" else address, cache)
    assert time.monotonic() - started < 40
    if whole:
        assert ended.stdout == whole.stdout, ended.stderr
    else:
        assert f"ModelError: model {NAME}: there is no such folder, and the hub does not give it" in ended.stderr


def test_a_tokenizer_of_the_hub_comes_without_weights(hub, tmp_path):
    code = f"from distilcb.hub import model_folder; print(model_folder({NAME!r}, what='tokenizer', weights=False))"
    environ = {"HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert (Path(done.stdout.splitlines()[-1]) / "tokenizer.json").is_file()
    assert "model.safetensors" not in hub[2]


@pytest.mark.parametrize("name", ["~nobody_of_this_name/model", "~nobody_of_this_name"])
def test_the_home_of_nobody_is_a_users_mistake(name):
    with pytest.raises(ModelError, match="cannot be read"):
        model_folder(name)


def test_a_name_that_the_hub_does_not_know_is_refused(hub, tmp_path):
    ended = ask("almanach/camenbert", hub[0], tmp_path / "cache")
    assert "ModelError: model almanach/camenbert: there is no such folder, and the hub does not give it" in ended.stderr


def test_a_folder_is_itself_and_a_tilde_the_home(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    assert model_folder(str(tmp_path / "model")) == tmp_path / "model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_folder("~/model") == tmp_path / "model"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "no/such/student", "student.json"])
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(name):
    with pytest.raises(ModelError, match=r"does not exist\. Give the folder"):
        model_folder(name)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hub:wikimedia/wikipedia", ("wikimedia/wikipedia", None, "train")),
        ("hub:wikimedia/wikipedia:20231101.fr", ("wikimedia/wikipedia", "20231101.fr", "train")),
        ("hub:wikimedia/wikipedia:20231101.fr:test", ("wikimedia/wikipedia", "20231101.fr", "test")),
        ("hub:some/text::validation", ("some/text", None, "validation")),
        ("hub:some/text:fr:train[:10%]", ("some/text", "fr", "train[:10%]")),
    ],
)
def test_a_data_set_is_name_configuration_and_split(text, parts):
    parsed = HubDataset.parse(text)
    assert (parsed.name, parsed.config, parsed.split) == parts
    assert HubDataset.parse(str(parsed)) == parsed


@pytest.mark.parametrize("text", ["hub:", "hub::fr"])
def test_a_data_set_without_a_name_is_refused(text):
    with pytest.raises(DataError, match="needed hub:NAME"):
        HubDataset.parse(text)
