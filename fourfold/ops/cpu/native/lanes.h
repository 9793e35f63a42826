// As many floats at a time as a register of the processor that is compiled for holds (see build.py). Wider vectors than
// that the compiler keeps in memory, at a tenth of the speed.
#pragma once

#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t IntLanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t WordLanes __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfLanes __attribute__((vector_size(2 * LANES)));
typedef int16_t ShortLanes __attribute__((vector_size(2 * LANES)));
typedef int8_t ByteLanes __attribute__((vector_size(LANES)));

// 0, 1, 2, ...
INLINE IntLanes counted() {
    IntLanes lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane;
}

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

// Rounded to bfloat16, the `some` that there is room for
INLINE void store_some(uint16_t* to, Lanes v, int64_t some) {
    const WordLanes bits = (WordLanes)v;
    const HalfLanes half = __builtin_convertvector((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, HalfLanes);
    std::memcpy(to, &half, some >= LANES ? sizeof half : some * 2);
}

INLINE void store_some(float* to, Lanes v, int64_t some) { std::memcpy(to, &v, some >= LANES ? sizeof v : some * 4); }

INLINE float sum(Lanes v) {
    for (int d = LANES / 2; d > 1; d /= 2) v += __builtin_shuffle(v, counted() ^ d);
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
    const IntLanes lane = counted(), odd = (lane & d) != 0;
    return __builtin_shuffle(low, high, odd ? lane - d + LANES : lane) +
           __builtin_shuffle(low, high, odd ? lane + LANES : lane + d);
}

// tile[i][j] becomes tile[j][i]: of each two rows d apart, two squares of side d change places
INLINE void transpose(Lanes tile[LANES]) {
    const IntLanes lane = counted();
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
