"""Numba kernels of the hyper-connections; see ``fourfold.ops.reference.streams`` for the maths.

Axes: T tokens, n streams, d features. Tokens are independent, so they run in parallel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

CHUNKS = 16  # of the token axis, each with scratch memory of its own

_options: dict[str, Any] = {"parallel": True, "fastmath": True, "cache": True, "nogil": True}


@njit(fastmath=True, cache=True)
def _sinkhorn(logits, iterations, eps, stages, sums):  # type: ignore[no-untyped-def]
    """Fills stages [2 * iterations, n, n] (softmax first, then every normalisation) and the divisors sums."""
    n = logits.shape[0]
    for i in range(n):
        top = logits[i, 0]
        for j in range(1, n):
            top = max(top, logits[i, j])
        total = logits[i, 0] * 0
        for j in range(n):
            stages[0, i, j] = np.exp(logits[i, j] - top)
            total += stages[0, i, j]
        for j in range(n):
            stages[0, i, j] = stages[0, i, j] / total + eps
    for step in range(1, 2 * iterations):
        for a in range(n):
            total = stages[0, 0, 0] * 0 + eps
            for b in range(n):
                total += stages[step - 1, b, a] if step % 2 else stages[step - 1, a, b]
            sums[step, a] = total
            for b in range(n):
                if step % 2:
                    stages[step, b, a] = stages[step - 1, b, a] / total
                else:
                    stages[step, a, b] = stages[step - 1, a, b] / total


@njit(**_options)
def maps(hidden, pre, post, comb, iterations, eps):  # type: ignore[no-untyped-def]
    """hidden: [T, n(n+2)], before the nonlinearities; fills pre [T, n], post [T, n], comb [T, n, n]."""
    total, n = pre.shape
    for chunk in prange(CHUNKS):
        stages = np.empty((2 * iterations, n, n), hidden.dtype)
        sums = np.empty((2 * iterations, n), hidden.dtype)
        for t in range(chunk * total // CHUNKS, (chunk + 1) * total // CHUNKS):
            for i in range(n):
                pre[t, i] = 1 / (1 + np.exp(-hidden[t, i])) + eps
                post[t, i] = 2 / (1 + np.exp(-hidden[t, n + i]))
            _sinkhorn(hidden[t, 2 * n :].reshape(n, n), iterations, eps, stages, sums)
            comb[t] = stages[2 * iterations - 1]


@njit(**_options)
def maps_backward(hidden, pre, post, dpre, dpost, dcomb, out, n, iterations, eps):  # type: ignore[no-untyped-def]
    """Gradient of ``maps`` with respect to hidden; Sinkhorn's stages are computed again."""
    total = hidden.shape[0]
    for chunk in prange(CHUNKS):
        stages = np.empty((2 * iterations, n, n), hidden.dtype)
        sums = np.empty((2 * iterations, n), hidden.dtype)
        g = np.empty((n, n), hidden.dtype)
        for t in range(chunk * total // CHUNKS, (chunk + 1) * total // CHUNKS):
            for i in range(n):
                gate = pre[t, i] - eps
                out[t, i] = dpre[t, i] * gate * (1 - gate)
                out[t, n + i] = dpost[t, i] * post[t, i] * (1 - post[t, i] / 2)
            _sinkhorn(hidden[t, 2 * n :].reshape(n, n), iterations, eps, stages, sums)
            g[:] = dcomb[t]
            for back in range(2 * iterations - 1):
                step = 2 * iterations - 1 - back
                for a in range(n):
                    inner = g[0, 0] * 0
                    for b in range(n):
                        inner += g[b, a] * stages[step, b, a] if step % 2 else g[a, b] * stages[step, a, b]
                    for b in range(n):
                        if step % 2:
                            g[b, a] = (g[b, a] - inner) / sums[step, a]
                        else:
                            g[a, b] = (g[a, b] - inner) / sums[step, a]
            for i in range(n):
                inner = g[0, 0] * 0
                for j in range(n):
                    inner += g[i, j] * (stages[0, i, j] - eps)
                for j in range(n):
                    out[t, 2 * n + i * n + j] = (stages[0, i, j] - eps) * (g[i, j] - inner)


@njit(**_options)
def read(x, pre, out):  # type: ignore[no-untyped-def]
    """out[t] = sum_i pre[t, i] x[t, i]."""
    total, n, d = x.shape
    for t in prange(total):
        for c in range(d):
            out[t, c] = pre[t, 0] * x[t, 0, c]
        for i in range(1, n):
            for c in range(d):
                out[t, c] += pre[t, i] * x[t, i, c]


@njit(**_options)
def read_backward(x, pre, g, dx, dpre):  # type: ignore[no-untyped-def]
    total, n, d = x.shape
    for t in prange(total):
        for i in range(n):
            inner = g[t, 0] * 0
            for c in range(d):
                inner += g[t, c] * x[t, i, c]
                dx[t, i, c] = pre[t, i] * g[t, c]
            dpre[t, i] = inner


@njit(**_options)
def mix(x, y, post, comb, out):  # type: ignore[no-untyped-def]
    """out[t, k] = post[t, k] y[t] + sum_j comb[t, j, k] x[t, j]."""
    total, n, d = x.shape
    for t in prange(total):
        for k in range(n):
            for c in range(d):
                out[t, k, c] = post[t, k] * y[t, c]
            for j in range(n):
                for c in range(d):
                    out[t, k, c] += comb[t, j, k] * x[t, j, c]


@njit(**_options)
def mix_backward(x, y, post, comb, g, dx, dy, dpost, dcomb):  # type: ignore[no-untyped-def]
    total, n, d = x.shape
    for t in prange(total):
        for c in range(d):
            dy[t, c] = post[t, 0] * g[t, 0, c]
        for k in range(1, n):
            for c in range(d):
                dy[t, c] += post[t, k] * g[t, k, c]
        for k in range(n):
            inner = g[t, 0, 0] * 0
            for c in range(d):
                inner += g[t, k, c] * y[t, c]
            dpost[t, k] = inner
        for j in range(n):
            for c in range(d):
                dx[t, j, c] = comb[t, j, 0] * g[t, 0, c]
            for k in range(1, n):
                for c in range(d):
                    dx[t, j, c] += comb[t, j, k] * g[t, k, c]
            for k in range(n):
                inner = g[t, 0, 0] * 0
                for c in range(d):
                    inner += x[t, j, c] * g[t, k, c]
                dcomb[t, j, k] = inner
