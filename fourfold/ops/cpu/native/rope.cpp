// Rotary embedding: of a few rows in float32, of any number in bfloat16.
#include <algorithm>

#include "lanes.h"
#include "team.h"

namespace {

constexpr int64_t WORTH_A_PART = 1 << 13;  // numbers

void put(float* to, float x) { *to = x; }
void put(uint16_t* to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *to = uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

template <class T>
INLINE void turn_one(const T* from, const float* c, const float* s, T* to, int64_t still, int64_t half, bool interleaved) {
    std::memcpy(to, from, still * sizeof(T));
    from += still, to += still;
    const int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : half;
    for (int64_t i = 0; i < half; i++) {
        const float first = number(from[i * step]), second = number(from[i * step + apart]);
        put(to + i * step, first * c[i] - second * s[i]);
        put(to + i * step + apart, first * s[i] + second * c[i]);
    }
}

void turn(const float* from, const float* c, const float* s, float* to, int64_t still, int64_t half,
          bool interleaved) {
    turn_one(from, c, s, to, still, half, interleaved);
}
void turn(const uint16_t* from, const float* c, const float* s, uint16_t* to, int64_t still, int64_t half,
          bool interleaved) {
    turn_one(from, c, s, to, still, half, interleaved);
}

template <class T>
void turn_all(const T* x, const float* cos, const float* sin, T* out, int64_t tokens, int64_t heads, int64_t width,
              int64_t dim, int64_t by_token, int64_t by_head, bool interleaved, int threads) {
    const int64_t half = dim / 2, each = std::max<int64_t>(1, WORTH_A_PART / (heads * width));
    in_parts(threads, int((tokens + each - 1) / each), [&](int part) {
        for (int64_t t = part * each; t < std::min(tokens, (part + 1) * each); t++)
            for (int64_t h = 0; h < heads; h++)
                turn(x + t * by_token + h * by_head, cos + t * half, sin + t * half, out + (t * heads + h) * width,
                     width - dim, half, interleaved);
    });
}

}  // namespace

// x: float or bfloat16 [tokens, heads, width] of strides by_token and by_head, of which the last `dim` numbers are turned;
// cos, sin: float [tokens, dim / 2]; out: as x, contiguous. Interleaved pairs are (0, 1), (2, 3), ..., others (i, i + dim / 2).
extern "C" void ff_rope(int bfloat16, const void* x, const float* cos, const float* sin, void* out, int64_t tokens,
                        int64_t heads, int64_t width, int64_t dim, int64_t by_token, int64_t by_head, int interleaved,
                        int threads) {
    if (bfloat16)
        turn_all(static_cast<const uint16_t*>(x), cos, sin, static_cast<uint16_t*>(out), tokens, heads, width, dim,
                 by_token, by_head, interleaved, threads);
    else
        turn_all(static_cast<const float*>(x), cos, sin, static_cast<float*>(out), tokens, heads, width, dim, by_token,
                 by_head, interleaved, threads);
}
