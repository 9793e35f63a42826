// Index scores by the matrix unit (AMX), which multiplies 16 keys with 16 heads at once.
//
// Keys in bfloat16, int8 or e4m3 are bfloat16 numbers without loss. A query is the sum of two of those, which keeps
// 16 bits of it: a score is off by no more than float32 keys and sums would be.
#pragma once

#include "matrix.h"

#ifdef HAS_MATRIX

namespace matrix {

constexpr int64_t HEADS = 8;  // of a query in a tile

// Queries laid out for the unit: for each pair of queries, eight heads and 32 numbers a tile of what is left of them
// when rounded, and one of the rest; and the weights of the heads, 0 where there is none.
struct Queries {
    int64_t groups, steps;
    std::vector<uint16_t> tiles;
    std::vector<float> weights;

    void lay_out(const float* q, const float* weight, int64_t count, int64_t heads, int64_t width) {
        groups = (heads + HEADS - 1) / HEADS, steps = (width + DEPTH - 1) / DEPTH;
        const int64_t pairs = (count + 1) / 2;
        tiles.assign(pairs * groups * steps * 2 * TILE, 0);
        weights.assign(pairs * groups * 2 * HEADS, 0.f);
        for (int64_t i = 0; i < count; i++)
            for (int64_t h = 0; h < heads; h++) {
                const int64_t group = i / 2 * groups + h / HEADS, column = i % 2 * HEADS + h % HEADS;
                weights[group * 2 * HEADS + column] = weight[i * heads + h];
                for (int64_t k = 0; k < width; k++) {
                    uint16_t* tile = tiles.data() + (group * steps + k / DEPTH) * 2 * TILE;
                    const int64_t at = k % DEPTH / 2 * DEPTH + column * 2 + k % 2;
                    const float x = q[(i * heads + h) * width + k];
                    tile[at] = to_bfloat16(x);
                    tile[TILE + at] = to_bfloat16(x - number(tile[at]));
                }
            }
    }
};

// products[n][i][j]: of key 16 n + i, rows of 32 * steps numbers, and head j % 8 of the group of query j / 8 of the pair;
// N: 1, 2 or 4. Several tiles at once, for each waits long for the one before it.
template <int N> MATRIX inline void multiply_keys(const Queries& queries, int64_t group, const uint16_t* keys, float (*products)[LANES * LANES]) {
    const int64_t depth = queries.steps * DEPTH, tile = 16 * depth, bytes = depth * 2;
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (N > 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < queries.steps; k++) {
        const uint16_t *query = queries.tiles.data() + (group * queries.steps + k) * 2 * TILE, *key = keys + k * DEPTH;
        _tile_loadd(4, query, 64);
        _tile_loadd(5, query + TILE, 64);
        _tile_loadd(6, key, bytes);
        _tile_dpbf16ps(0, 6, 4);
        _tile_dpbf16ps(0, 6, 5);
        if constexpr (N > 1) {
            _tile_loadd(7, key + tile, bytes);
            _tile_dpbf16ps(1, 7, 4);
            _tile_dpbf16ps(1, 7, 5);
        }
        if constexpr (N > 2) {
            _tile_loadd(6, key + 2 * tile, bytes);
            _tile_dpbf16ps(2, 6, 4);
            _tile_dpbf16ps(2, 6, 5);
            _tile_loadd(7, key + 3 * tile, bytes);
            _tile_dpbf16ps(3, 7, 4);
            _tile_dpbf16ps(3, 7, 5);
        }
    }
    _tile_stored(0, products[0], 64);
    if constexpr (N > 1) _tile_stored(1, products[1], 64);
    if constexpr (N > 2) {
        _tile_stored(2, products[2], 64);
        _tile_stored(3, products[3], 64);
    }
}

// rows[0] and rows[8]: sum over eight lanes, each half for itself, of weight relu(rows[i]) for i < 8 and i >= 8
MATRIX INLINE void add_heads(Lanes rows[LANES], Lanes weight) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = (rows[i] > 0.f ? rows[i] : Lanes{}) * weight;
#pragma GCC unroll 3
    for (int d = 1; d < HEADS; d *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i += 2 * d) rows[i] = fold(rows[i], rows[i + d], d);
}

INLINE void store_halves(Lanes both, float* low, float* high) {
    const char* from = reinterpret_cast<const char*>(&both);
    std::memcpy(low, from, HEADS * 4);
    std::memcpy(high, from + HEADS * 4, HEADS * 4);
}

// out[0 .. 16 N - 1] and out[stride ..]: the scores of 16 N keys for a pair
template <int N> MATRIX void score_pair(const Queries& queries, int64_t pair, const uint16_t* keys, float* out, int64_t stride) {
    Lanes totals[2 * N] = {};  // sums over the heads of both, of eight keys each
    alignas(64) float products[N][LANES * LANES];
    for (int64_t g = pair * queries.groups; g < (pair + 1) * queries.groups; g++) {
        multiply_keys<N>(queries, g, keys, products);
        const Lanes weight = load(queries.weights.data() + g * 2 * HEADS);
        for (int n = 0; n < N; n++) {
            Lanes rows[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) rows[i] = load(products[n] + i * LANES);
            add_heads(rows, weight);
            totals[2 * n] += rows[0], totals[2 * n + 1] += rows[HEADS];
        }
    }
    for (int i = 0; i < 2 * N; i++) store_halves(totals[i], out + i * HEADS, out + stride + i * HEADS);
}

// out[0 .. 63]: the scores of 64 keys for one query
MATRIX inline void score_one(const Queries& queries, int64_t query, const uint16_t* keys, float* out) {
    constexpr int N = 4;
    Lanes totals[N] = {};  // of keys of two tiles, eight each
    alignas(64) float products[N][LANES * LANES];
    const int64_t first = query / 2 * queries.groups, own = query % 2 * HEADS;
    for (int64_t g = first; g < first + queries.groups; g++) {
        multiply_keys<N>(queries, g, keys, products);
        const __m256 half = _mm256_loadu_ps(queries.weights.data() + g * 2 * HEADS + own);
        const Lanes weight = (Lanes)_mm512_insertf32x8(_mm512_castps256_ps512(half), half, 1);
        for (int n = 0; n < N; n += 2) {
            Lanes rows[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                const float *low = products[n] + i * LANES + own, *high = products[n + 1] + i * LANES + own;
                rows[i] = (Lanes)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_load_ps(low)), _mm256_load_ps(high), 1);
            }
            add_heads(rows, weight);
            totals[n] += rows[0], totals[n + 1] += rows[HEADS];
        }
    }
    for (int n = 0; n < N; n += 2) {
        float *low = out + n * LANES, *high = low + LANES;
        store_halves(totals[n], low, high);
        store_halves(totals[n + 1], low + HEADS, high + HEADS);
    }
}

}  // namespace matrix

#endif
