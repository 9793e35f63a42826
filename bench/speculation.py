"""Decoding of the bundled model with its MTP block guessing ahead, beside the same without.

The answers are the same token for token, so only their speed differs.
"""

from __future__ import annotations

import time

from _report import case, finish, median, parser

import fourfold as ff
from fourfold.serve.engine import Engine
from fourfold.serve.request import Finished, Request, Sampling
from fourfold.text.chat import Message

QUESTIONS = ("What is 347 + 586?", "Tell me a story about a fox.", "Who are you?", "What is a lantern?")
TOKENS = 120
MODES = ("off", "on", "auto")


def answer(engine: Engine, question: str, temperature: float, seed: int) -> tuple[int, float]:
    """Tokens after the first one and their seconds."""
    prompt = engine.encode([Message("user", [question])])
    tokens, times = 0, []
    for event in engine.submit(Request(prompt, Sampling(temperature, seed=seed), TOKENS)):
        times.append(time.perf_counter())
        if isinstance(event, Finished):
            tokens = event.usage.completion_tokens - 1
    return tokens, times[-1] - times[0]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--quant", choices=("int8", "int4"))
    args = flags.parse_args()
    model = ff.load("nano", quant=args.quant)
    cases = {}
    for temperature in (0.0, 1.0):
        rates: dict[str, list[float]] = {mode: [] for mode in MODES}
        engines = {mode: Engine(model.model, model.tokenizer, model.chat, speculate=mode) for mode in MODES}
        for run in range(args.repeats + 1):
            for mode, engine in engines.items():
                tokens, seconds = zip(*(answer(engine, q, temperature, run) for q in QUESTIONS), strict=True)
                if run:
                    rates[mode].append(sum(tokens) / sum(seconds))
        base = median(rates["off"])
        for mode in ("on", "auto"):
            stats = engines[mode].stats()
            shares = {
                "guesses": stats["drafted_tokens"],
                "accepted": stats["accepted_tokens"],
                "peer_name": "without guesses",
            }
            name = f"{args.quant or 'float32'}, temperature {temperature:g}, guesses {mode}"
            cases[name] = case(median(rates[mode]), base, None, "tokens/s", rates[mode], **shares)
            print(f"{name}: {shares['accepted']} of {shares['guesses']} guesses were right")
        for engine in engines.values():
            engine.close()
    model.close()
    finish(cases, args.json)


if __name__ == "__main__":
    main()
