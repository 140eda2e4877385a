"""`shardlaunch serve`: answers over HTTP, and requests that are refused."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from shardlaunch import UserError
from shardlaunch.launcher.commands.predict import open_classifier
from shardlaunch.launcher.commands.serve.main import Server, new_server
from shardlaunch.recipes.mnist_mlp import MnistMlp
from tests.recipes import LinearNet, run_well
from tests.unit.launcher.commands.test_text_models import TEXTS, classifier, generator

__all__ = ["classifier", "generator"]  # fixtures


@pytest.fixture
def serving() -> Iterator[Callable[[Path], Server]]:
    """Return what serves a run until the end of the test."""
    servers: list[tuple[Server, threading.Thread]] = []

    def start(run: Path) -> Server:
        server = new_server(run, host="127.0.0.1", port=0, ema=False, recipe="")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def asked(
    server: Server, body: Any, *, path: str = "/predict", method: str = "POST", **headers: str
) -> tuple[int, Any]:
    """Return the status and the answer to a request."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, data, {"Content-Type": "application/json", **names})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content) if content[:1] == b"{" else content.decode()


def test_texts(serving: Callable[[Path], Server], classifier: Path) -> None:
    server = serving(classifier)
    status, answer = asked(server, {"texts": list(TEXTS)})
    expected = list(open_classifier(classifier, ema=False).predictions(TEXTS))
    assert status == 200
    assert [[*one["scores"].values()] for one in answer["predictions"]] == [pytest.approx(row) for row in expected]
    assert "<form>" in asked(server, b"", path="/", method="GET")[1]
    for body, problem in (
        ({"texts": []}, "must be 1 to 256"),
        ({"text": "x"}, "unknown field `text`"),
        (b"{", "truncated"),
        (b"\xff", "malformed"),
    ):
        status, answer = asked(server, body)
        assert status == 400
        assert problem in answer["error"]
    assert asked(server, {}, path="/other")[0] == 404
    assert asked(server, {}, Content_Type="text/plain")[0] == 415
    assert asked(server, {}, Origin="http://elsewhere.example")[0] == 403
    assert asked(server, {}, Host="elsewhere.example")[0] == 403
    assert asked(server, {"texts": ["a"]}, Origin=f"http://127.0.0.1:{server.server_port}")[0] == 200
    with pytest.raises(UserError, match="choose another --port"):
        new_server(classifier, host="127.0.0.1", port=server.server_port, ema=False, recipe="")


def test_prompts(serving: Callable[[Path], Server], generator: Path) -> None:
    server = serving(generator)
    status, answer = asked(server, {"prompt": "a fine", "max_new_tokens": 3})
    assert (status, answer["text"].startswith("a fine")) == (200, True)
    status, answer = asked(server, {"prompt": "a fine", "max_new_tokens": 0})
    assert (status, answer["error"]) == (400, "--max-new-tokens 0: must be at least 1")


def test_pictures(serving: Callable[[Path], Server], tmp_path: Path) -> None:
    run_well(
        MnistMlp, ["--data", "demo", "--max-steps", "1", "--tracker", "none", "--output-dir", str(tmp_path / "run")]
    )
    server = serving(tmp_path / "run")
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40)).save(buffer, "PNG")
    status, answer = asked(server, {"image": base64.b64encode(buffer.getvalue()).decode()})
    assert status == 200
    (found,) = answer["predictions"]
    assert list(found["scores"]) == [str(digit) for digit in range(10)]
    assert sum(found["scores"].values()) == pytest.approx(1)
    served: Any = server.served
    with torch.no_grad():
        expected = served.model(torch.zeros(1, 28 * 28)).softmax(dim=-1)[0]
    assert list(found["scores"].values()) == pytest.approx(expected.tolist())
    assert "not a readable picture" in asked(server, {"image": base64.b64encode(b"what").decode()})[1]["error"]
    assert "not in base64" in asked(server, {"image": "%"})[1]["error"]


def test_other_models_are_refused(tmp_path: Path) -> None:
    run_well(LinearNet, ["--max-steps", "1", "--output-dir", str(tmp_path / "run")])
    with pytest.raises(UserError, match="only classifiers of texts and pictures and language models are served"):
        new_server(tmp_path / "run", host="127.0.0.1", port=0, ema=False, recipe="")
    with pytest.raises(UserError, match="--port 70000: must be from 0"):
        new_server(tmp_path / "run", host="127.0.0.1", port=70_000, ema=False, recipe="")
