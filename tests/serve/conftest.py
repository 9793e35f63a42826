import pytest

from fourfold.serve.engine import Engine
from tests.serve.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model():
    return tiny_model()


@pytest.fixture
def engine(model, tokenizer):
    with Engine(model, tokenizer, page_size=16) as engine:
        yield engine
