import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fourfold.weights.checkpoint import save_model
from tests.serve.tiny import tiny_model, tiny_tokenizer


class Server:
    """A server in a process of its own."""

    def __init__(self, model: Path, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fourfold", "serve", str(model), "--port", "0", *args],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        found = re.search(r"http://127\.0\.0\.1:\d+", self.process.stdout.readline())
        assert found, "the server did not start"
        self.url = found[0]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.process.stdout.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The directory of a tiny model with random weights."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(directory, tiny_model(), tiny_tokenizer())
    return directory


@pytest.fixture
def start(tiny):
    """Starts servers that the test may end itself."""
    servers = []

    def starter(*args: str) -> Server:
        servers.append(Server(tiny, *args))
        return servers[-1]

    yield starter
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(tiny):
    server = Server(tiny)
    yield server
    server.stop()
