"""Decoding of the bundled model with its MTP block guessing ahead, beside the same without.

The answers are the same token for token, so only their speed differs. Where that comes from is told beside it: what a
step of one and of two positions costs, what a guess costs, and what they would give if every guess were right.
"""

from __future__ import annotations

import time
from typing import Any

from _report import case, finish, median, parser

import fourfold as ff
from fourfold.model.sequence import Packed
from fourfold.model.transformer import Model
from fourfold.serve.engine import Engine
from fourfold.serve.request import Finished, Request, Sampling
from fourfold.serve.speculate import Speculator
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


def costs(engine: Engine, model: Model, temperature: float) -> dict[str, float]:
    """Milliseconds of decoding: a step from its beginning to that of the next, its forward of one or two positions,
    and a guess. Medians over the questions, apart from what is timed."""
    spent: dict[str, list[float]] = {"step": [], "one": [], "two": [], "guess": []}
    began, decodes = 0.0, False

    def begin(_: object, args: tuple[Packed]) -> None:
        nonlocal began, decodes
        now, before = time.perf_counter(), decodes
        decodes = len(args[0]) <= 2
        if before and decodes:
            spent["step"].append(now - began)
        began = now

    def end(_: object, args: tuple[Packed], __: object) -> None:
        if decodes:
            spent["one" if len(args[0]) == 1 else "two"].append(time.perf_counter() - began)

    def timed(batch: list[Any]) -> None:
        start = time.perf_counter()
        Speculator.guess(speculator, batch)
        if decodes:
            spent["guess"].append(time.perf_counter() - start)

    hooks, speculator = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)], engine._speculator
    if speculator is not None:
        speculator.guess = timed  # type: ignore[method-assign]
    for question in QUESTIONS:
        answer(engine, question, temperature, 0)
        decodes = False
    for hook in hooks:
        hook.remove()
    return {f"{name}_ms": 1000 * median(all_) for name, all_ in spent.items() if all_}


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
            if mode == "on":
                shares |= {"costs_off": costs(engines["off"], model.model, temperature)}
                shares |= {"costs_on": costs(engines["on"], model.model, temperature)}
            cases[name] = case(median(rates[mode]), base, None, "tokens/s", rates[mode], **shares)
            print(f"{name}: {shares['accepted']} of {shares['guesses']} guesses were right; {shares}")
        for engine in engines.values():
            engine.close()
    model.close()
    finish(cases, args.json)


if __name__ == "__main__":
    main()
