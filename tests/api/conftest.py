import pytest
from fastapi.testclient import TestClient

from fourfold.api.app import create_app
from fourfold.serve.engine import Engine
from tests.serve.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def engine():
    with Engine(tiny_model(), tiny_tokenizer(), page_size=16) as engine:
        yield engine


@pytest.fixture(scope="session")
def client(engine):
    with TestClient(create_app(engine, "tiny"), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def locked(engine):
    with TestClient(create_app(engine, "tiny", api_key="sesame", max_body=2000)) as client:
        yield client
