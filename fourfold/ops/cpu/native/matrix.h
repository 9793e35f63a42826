// The matrix unit of recent Xeons (AMX): eight tiles of 16 rows of 64 bytes, and sums of products of bfloat16 between
// them. A product is C [16, 16] += A [16, 32] B [32, 16], in float32; A lies row by row, B with two rows side by side.
#pragma once

#include <algorithm>
#include <vector>

#include "lanes.h"

#if defined(__AVX512F__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define HAS_MATRIX 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define MATRIX __attribute__((target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16")))

namespace matrix {

constexpr int64_t SIDE = 16, DEPTH = 32, TILE = 512;  // rows of a tile, numbers in one of A's, numbers in all

// Whether the processor has one and the system lets this process use it
inline bool is_there() {
    static const bool found = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & BF16) == 0 || (d & TILES) == 0) return false;
        if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) return false;
        if (!__builtin_cpu_supports("avx512bf16")) return false;
        return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    }();
    return found;
}

struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Around what a thread computes with tiles
MATRIX inline void configure() {
    static const Configuration configuration;
    _tile_loadconfig(&configuration);
}
MATRIX inline void release() { _tile_release(); }

inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Memory from the beginning of a cache line on, for a row of a tile is one; what was in it is lost
template <class T> class Space {
    struct alignas(64) Line {
        char bytes[64];
    };
    std::vector<Line> lines;

public:
    T* room(int64_t count) {
        const size_t wanted = (count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
        if (lines.size() < wanted) lines.resize(wanted);
        return reinterpret_cast<T*>(lines.data());
    }
};

// Sixteen floats rounded to the `some` bfloat16 numbers that there is room for
MATRIX inline void store_rounded(uint16_t* to, Lanes x, int64_t some = LANES) {
    const __mmask16 there = some >= LANES ? 0xFFFF : (1 << some) - 1;
    _mm256_mask_storeu_epi16(to, there, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

// Sixteen words of two floats each, rounded
MATRIX inline void store_side_by_side(uint16_t* to, Lanes first, Lanes second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// Sixteen words of two bfloat16 numbers each: first[i] and second[i], of the `some` that there are; null: zeros
MATRIX inline Lanes side_by_side(const uint16_t* first, const uint16_t* second, int64_t some) {
    const __mmask16 there = some >= LANES ? 0xFFFF : (1 << some) - 1;
    const __m512i low = first ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, first)) : __m512i{};
    const __m512i high = second ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, second)) : __m512i{};
    return (Lanes)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// B of 16 rows that become its columns, a tile for each 32 numbers of them; null: zeros
MATRIX inline void lay_columns(const uint16_t* const* rows, int64_t width, uint16_t* tiles) {
    for (int64_t k = 0; k < width; k += DEPTH, tiles += TILE) {
        const __mmask32 there = width - k >= DEPTH ? ~0u : (1u << (width - k)) - 1;
        Lanes words[SIDE];
        for (int64_t i = 0; i < SIDE; i++)
            words[i] = rows[i] ? (Lanes)_mm512_maskz_loadu_epi16(there, rows[i] + k) : Lanes{};
        transpose(words);
        for (int64_t i = 0; i < SIDE; i++) std::memcpy(tiles + i * DEPTH, words + i, sizeof(Lanes));
    }
}

// B of 32 rows that stay its rows, a tile for each 16 numbers of them; null: zeros
MATRIX inline void lay_rows(const uint16_t* const* rows, int64_t width, uint16_t* tiles) {
    for (int64_t n = 0; n < width; n += SIDE, tiles += TILE)
        for (int64_t i = 0; i < SIDE; i++) {
            const uint16_t *first = rows[2 * i], *second = rows[2 * i + 1];
            const Lanes words = side_by_side(first ? first + n : nullptr, second ? second + n : nullptr, width - n);
            std::memcpy(tiles + i * DEPTH, &words, sizeof words);
        }
}

// c [32, 32], rows `width` apart, = A B over `steps` tiles: rows of A `row` apart, tiles of B `step` apart, and those of
// its other sixteen columns `column` after them; MORE: added to what c holds. Four tiles of C at once, so that each tile
// read serves twice.
template <bool MORE = false>
MATRIX inline void multiply(const uint16_t* a, int64_t row, const uint16_t* b, int64_t step, int64_t column,
                            int64_t steps, float* c, int64_t width) {
    if constexpr (MORE) {
        _tile_loadd(0, c, width * 4);
        _tile_loadd(1, c + SIDE, width * 4);
        _tile_loadd(2, c + SIDE * width, width * 4);
        _tile_loadd(3, c + SIDE * width + SIDE, width * 4);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; k++) {
        _tile_loadd(4, a + k * DEPTH, row * 2);
        _tile_loadd(6, b + k * step, 64);
        _tile_loadd(7, b + k * step + column, 64);
        _tile_loadd(5, a + k * DEPTH + SIDE * row, row * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, width * 4);
    _tile_stored(1, c + SIDE, width * 4);
    _tile_stored(2, c + SIDE * width, width * 4);
    _tile_stored(3, c + SIDE * width + SIDE, width * 4);
}

}  // namespace matrix

#endif
