"""Aggregate tokens a second of the engine with many streams at once, beside one stream alone.

Each stream has a prompt of its own and decodes greedily; times count from when every stream has its first token.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from _report import case, finish, median, parser

import fourfold as ff
from fourfold.model.sequence import Document
from fourfold.serve.local import LocalModel
from fourfold.serve.request import Delta, Request, Sampling


def rate(model: LocalModel, streams: int, prompt: int, answer: int, run: int) -> float:
    """Tokens a second of all streams together, between the last one's first token and the first one's last."""
    arrivals: list[list[float]] = [[] for _ in range(streams)]

    def listen(n: int) -> None:
        ids = [0, 4, *(((run * 97 + n) * 7919 + i * 31) % 3000 + 300 for i in range(prompt - 4)), 5, 8]
        request = Request(Document.text(ids), Sampling(1.0, seed=n), answer)
        for event in model.engine.submit(request):
            if isinstance(event, Delta):
                arrivals[n].append(time.perf_counter())

    threads = [threading.Thread(target=listen, args=(n,)) for n in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = [times for times in arrivals if len(times) > answer // 2]  # a few end early
    if not told:
        return rate(model, streams, prompt, answer, run + 1000)
    start, end = max(times[0] for times in told), min(times[-1] for times in told)
    return sum(sum(start < t <= end for t in times) for times in told) / (end - start)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", default="nano")
    flags.add_argument("--quant", choices=("int8", "int4"))
    flags.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    flags.add_argument("--prompt", type=int, default=64)
    flags.add_argument("--answer", type=int, default=200)
    args = flags.parse_args()
    model = ff.load(args.model, quant=args.quant)
    rates: dict[int, list[float]] = {n: [] for n in args.streams}
    for run in range(args.repeats + 1):
        for streams, found in rates.items():
            made = rate(model, streams, args.prompt, args.answer, run)
            if run:  # the first warms up
                found.append(made)
    model.close()
    alone = median(rates[args.streams[0]])
    cases: dict[str, Any] = {}
    for streams, found in rates.items():
        name = f"{args.model} {args.quant or 'float32'}, {streams} streams"
        cases[name] = case(median(found), alone, None, "tokens/s", found, peer_name=f"{args.streams[0]} stream")
    finish(cases, args.json)


if __name__ == "__main__":
    main()
