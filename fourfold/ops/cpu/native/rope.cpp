// Rotary embedding of a few rows.
#include "clones.h"
#include "lanes.h"

// x: float [tokens, heads, dim] of strides by_token and by_head; cos, sin: float [tokens, dim / 2];
// out: float [tokens, heads, dim]. Interleaved pairs are (0, 1), (2, 3), ..., others (i, i + dim / 2).
extern "C" CLONES void ff_rope(const float* x, const float* cos, const float* sin, float* out, int64_t tokens,
                               int64_t heads, int64_t dim, int64_t by_token, int64_t by_head, int interleaved) {
    const int64_t half = dim / 2, step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cos + t * half, *s = sin + t * half;
        for (int64_t h = 0; h < heads; h++) {
            const float* from = x + t * by_token + h * by_head;
            float* to = out + (t * heads + h) * dim;
            for (int64_t i = 0; i < half; i++) {
                const float first = from[i * step], second = from[i * step + apart];
                to[i * step] = first * c[i] - second * s[i];
                to[i * step + apart] = first * s[i] + second * c[i];
            }
        }
    }
}
