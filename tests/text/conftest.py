import pytest

from fourfold.text.tokenizer import Tokenizer, train_tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. THE QUICK BROWN FOX. the quick, brown fox!\n",
    "def add(a, b):\n    return a + b\n\nprint(add(12, 345))\n",
    "Zoë naïvely read the café's résumé; Größe, größe und GRÖSSE.\n",
    "नमस्ते दुनिया, 你好世界, привет мир, مرحبا بالعالم 🙂👍🏽\n",
] * 4


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, 440)
