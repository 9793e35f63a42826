// Sixteen floats at a time, in whatever registers the function around it is compiled for (see clones.h).
#pragma once

#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t WordLanes __attribute__((vector_size(64)));
typedef uint16_t HalfLanes __attribute__((vector_size(32)));
constexpr int LANES = 16;

INLINE Lanes load(const float* x) {
    Lanes v;
    std::memcpy(&v, x, sizeof v);
    return v;
}

INLINE Lanes load(const uint16_t* bfloat16) {
    HalfLanes half;
    std::memcpy(&half, bfloat16, sizeof half);
    return (Lanes)(__builtin_convertvector(half, WordLanes) << 16);
}

INLINE void store(float* x, Lanes v) { std::memcpy(x, &v, sizeof v); }

INLINE float number(float x) { return x; }
INLINE float number(uint16_t bfloat16) {
    const uint32_t bits = uint32_t(bfloat16) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// Rounded to bfloat16, the `some` of sixteen that there is room for
INLINE void store_some(uint16_t* to, Lanes v, int64_t some) {
    const WordLanes bits = (WordLanes)v;
    const HalfLanes half = __builtin_convertvector((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, HalfLanes);
    std::memcpy(to, &half, some >= LANES ? sizeof half : some * 2);
}

INLINE void store_some(float* to, Lanes v, int64_t some) { std::memcpy(to, &v, some >= LANES ? sizeof v : some * 4); }

INLINE float sum(Lanes v) {
    v += __builtin_shuffle(v, IntLanes{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v += __builtin_shuffle(v, IntLanes{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    v += __builtin_shuffle(v, IntLanes{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    return v[0] + v[1];
}

// e^x to about one part in 10^7: 2^n times a polynomial on |r| <= ln(2) / 2. Below -87 it gives e^-87, about 10^-38.
INLINE Lanes exponential(Lanes x) {
    x = x < 88.f ? x : Lanes{} + 88.f;
    x = x > -87.f ? x : Lanes{} - 87.f;
    constexpr float MAGIC = 12582912.f;  // rounds to an integer in the low bits
    const Lanes shifted = x * 1.44269504f + MAGIC, n = shifted - MAGIC;
    const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two pieces
    Lanes p = Lanes{} + 1.f / 5040;
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    const IntLanes exponent = ((IntLanes)shifted - 0x4B400000) << 23;
    return (Lanes)((IntLanes)p + exponent);
}

// Lane j: low[j] + low[j + d], or, where j has bit d, high[j - d] + high[j]
INLINE Lanes fold(Lanes low, Lanes high, int d) {
    const IntLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, odd = (lane & d) != 0;
    return __builtin_shuffle(low, high, odd ? lane - d + LANES : lane) +
           __builtin_shuffle(low, high, odd ? lane + LANES : lane + d);
}

// tile[i][j] becomes tile[j][i]: of each two rows d apart, two squares of side d change places
INLINE void transpose(Lanes tile[LANES]) {
    const IntLanes lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
    for (int d = 1; d < LANES; d *= 2) {
        const IntLanes odd = (lane & d) != 0;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & d) continue;
            const Lanes low = tile[i], high = tile[i + d];
            tile[i] = __builtin_shuffle(low, high, odd ? lane - d + LANES : lane);
            tile[i + d] = __builtin_shuffle(low, high, odd ? lane + LANES : lane + d);
        }
    }
}
