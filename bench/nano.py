"""First impression of the bundled model: time to the first token of a 200-token prompt, and decoding speed.

No peer runs this architecture with these weights, so there is none beside it.
"""

from __future__ import annotations

import time

from _report import case, finish, median, parser

import fourfold as ff
from fourfold.model.sequence import Document
from fourfold.serve.request import Delta, Request, Sampling

PROMPT, ANSWER = 200, 100


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--quant", choices=("int8", "int4"))
    args = flags.parse_args()
    model = ff.load("nano", quant=args.quant)
    first, rate = [], []
    for run in range(args.repeats + 1):
        # a fresh prompt each time, so that nothing comes from the prefix cache
        ids = [0, 4, *((run * 7919 + i * 31) % 3000 + 300 for i in range(PROMPT - 4)), 5, 8]
        began = time.perf_counter()
        handle = model.engine.submit(Request(Document.text(ids), Sampling(1.0, seed=run), ANSWER))
        times = [time.perf_counter() for event in handle if isinstance(event, Delta)]
        if run and len(times) > 10:
            first.append((times[0] - began) * 1000)
            rate.append((len(times) - 1) / (times[-1] - times[0]))
    model.close()
    numbers = args.quant or "float32"
    finish(
        {
            f"{numbers}: first token of a {PROMPT}-token prompt": case(median(first), None, None, "ms", first),
            f"{numbers}: decode, one stream": case(median(rate), None, None, "tokens/s", rate),
        },
        args.json,
    )


if __name__ == "__main__":
    main()
