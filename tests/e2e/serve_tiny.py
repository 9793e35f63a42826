"""The real server with a tiny random model: ``python -m tests.e2e.serve_tiny [KEY]``; prints its address."""

import sys

from fourfold.api.server import run_server
from fourfold.serve.engine import Engine
from tests.serve.tiny import tiny_model, tiny_tokenizer

if __name__ == "__main__":
    engine = Engine(tiny_model(), tiny_tokenizer(), page_size=16)
    run_server(engine, "tiny", port=0, api_key=sys.argv[1] if sys.argv[1:] else None)
