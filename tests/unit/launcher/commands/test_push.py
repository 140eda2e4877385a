"""`shardlaunch push`, to a hub of the test: a server that answers what huggingface_hub asks, and keeps the files."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from shardlaunch import UserError
from shardlaunch.launcher.commands.push import push_model
from tests.recipes import LinearNet, run_well

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """A stand-in for a hub, which cannot be reached from here; all files are sent within the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.commits: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            entries = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.server.files]
            return self._answer(entries)
        return self._answer({"error": f"GET {self.path} is not known"}, status=404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid user token."}, status=401)
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self._answer({"url": f"{self.server.url}/me/net", "name": "me/net"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            return self._answer(
                {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]}
            )
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    self.server.commits.append({"branch": self.path.rpartition("/")[2], **value})
                elif entry["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "deletedFile":
                    del self.server.files[value["path"]]
            url = f"{self.server.url}/me/net/commit/1"
            return self._answer({"success": True, "commitOid": "1", "commitUrl": url})
        if "/branch/" in self.path:
            return self._answer({})
        return self._answer({"error": f"POST {self.path} is not known"}, status=404)

    def _answer(self, document: Any, *, status: int = 200) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for module in (constants, huggingface_hub.hf_api.constants):
        monkeypatch.setattr(module, "ENDPOINT", server.url)
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "linear"
    run_well(LinearNet, ["--max-steps", "2", "--tracker", "none", "--output-dir", str(folder), "--save-every", "1"])
    return folder


def pushed(path: Path, repository: str = "me/net", **options: Any) -> int:
    defaults: dict[str, Any] = {"public": False, "revision": "", "message": ""}
    return push_model(path, repository, **{**defaults, "step": None, "ema": False, "merge": False, **options})


def test_the_model_of_a_run_replaces_an_earlier_one(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b"", "notes.md": b"mine"}
    assert pushed(run) == 0
    assert hub.created[0]["visibility" if "visibility" in hub.created[0] else "private"] in ("private", True)
    assert {"model.safetensors", "README.md", "notes.md"} <= hub.files.keys()
    assert not any("index" in name or "-of-" in name for name in hub.files)
    assert not any("optimizer" in name or "trainer" in name for name in hub.files), "no state of the run"
    said = capsys.readouterr().out
    assert f"{hub.url}/me/net/commit/1: " in said
    assert "names no license" in said


def test_an_exported_folder_goes_as_it_is(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    pushed(tmp_path, public=True, revision="int8", message="Smaller")
    assert hub.files == {"config.json": b"{}", "README.md": b"---\nlicense: mit\n---\n"}
    assert (hub.commits[0]["branch"], hub.commits[0]["summary"]) == ("int8", "Smaller")
    with pytest.raises(UserError, match="is an exported model; --step, --ema and --merge are for runs"):
        pushed(tmp_path, ema=True)


def test_refusals_in_one_message(hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, path: Path = run, repository: str = "me/net") -> None:
        with pytest.raises(UserError, match=match):
            pushed(path, repository)
        assert not hub.files

    refused("'net' names no owner; give OWNER/net", repository="net")
    refused("is no name of a repository", repository="me/n--t/x")
    refused("neither a run", path=tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    refused(r"push: me/net at http://127.*Log in with `hf auth login`, or set HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set; unset it to push")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.shutdown()
    hub.server_close()
    refused("cannot be reached or read")
