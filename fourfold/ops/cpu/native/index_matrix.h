// Index scores by the matrix unit (AMX), which multiplies 16 keys with 16 heads at once.
//
// Keys that many queries look at lie in columns beside each other, so that a score is a sum over rows (score_tile); those
// that one query looks at stay rows as they were gathered (score_one).
//
// Keys in bfloat16, int8 or e4m3 are bfloat16 numbers without loss, and queries come rounded to them.
#pragma once

#include "matrix.h"

#ifdef HAS_MATRIX

namespace matrix {

constexpr int64_t HEADS = 8;  // of a query in a tile

// Queries laid out for the unit: for each pair of queries a tile of eight heads and 32 numbers; and the weights of the
// heads, 0 where there is none.
struct Queries {
    int64_t groups, steps;
    std::vector<uint16_t> tiles;
    std::vector<float> weights;

    void lay_out(const float* q, const float* weight, int64_t count, int64_t heads, int64_t width) {
        groups = (heads + HEADS - 1) / HEADS, steps = (width + DEPTH - 1) / DEPTH;
        const int64_t pairs = (count + 1) / 2;
        tiles.assign(pairs * groups * steps * TILE, 0);
        weights.assign(pairs * groups * 2 * HEADS, 0.f);
        for (int64_t i = 0; i < count; i++)
            for (int64_t h = 0; h < heads; h++) {
                const int64_t group = i / 2 * groups + h / HEADS, column = i % 2 * HEADS + h % HEADS;
                weights[group * 2 * HEADS + column] = weight[i * heads + h];
                for (int64_t k = 0; k < width; k++) {
                    uint16_t* tile = tiles.data() + (group * steps + k / DEPTH) * TILE;
                    tile[k % DEPTH / 2 * DEPTH + column * 2 + k % 2] = to_bfloat16(q[(i * heads + h) * width + k]);
                }
            }
    }
};

constexpr int64_t COLUMNS = 4;  // tiles of keys at once, for each waits long for the one before it

// products[n][i][j]: of key 16 n + i, rows of 32 * steps numbers, and head j % 8 of the group of query j / 8 of the pair
MATRIX inline void multiply_keys(const Queries& queries, int64_t group, const uint16_t* keys, float (*products)[LANES * LANES]) {
    const int64_t depth = queries.steps * DEPTH, tile = 16 * depth, bytes = depth * 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < queries.steps; k++) {
        const uint16_t* key = keys + k * DEPTH;
        _tile_loadd(4, queries.tiles.data() + (group * queries.steps + k) * TILE, 64);
        _tile_loadd(5, key, bytes);
        _tile_loadd(6, key + tile, bytes);
        _tile_loadd(7, key + 2 * tile, bytes);
        _tile_dpbf16ps(0, 5, 4);
        _tile_loadd(5, key + 3 * tile, bytes);
        _tile_dpbf16ps(1, 6, 4);
        _tile_dpbf16ps(2, 7, 4);
        _tile_dpbf16ps(3, 5, 4);
    }
    _tile_stored(0, products[0], 64);
    _tile_stored(1, products[1], 64);
    _tile_stored(2, products[2], 64);
    _tile_stored(3, products[3], 64);
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

// out[0 .. 63]: the scores of 64 keys for one query
MATRIX inline void score_one(const Queries& queries, int64_t query, const uint16_t* keys, float* out) {
    Lanes totals[COLUMNS] = {};  // of keys of two tiles, eight each
    alignas(64) float products[COLUMNS][LANES * LANES];
    const int64_t first = query / 2 * queries.groups, own = query % 2 * HEADS;
    for (int64_t g = first; g < first + queries.groups; g++) {
        multiply_keys(queries, g, keys, products);
        const __m256 half = _mm256_loadu_ps(queries.weights.data() + g * 2 * HEADS + own);
        const Lanes weight = (Lanes)_mm512_insertf32x8(_mm512_castps256_ps512(half), half, 1);
        for (int n = 0; n < COLUMNS; n += 2) {
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
    for (int n = 0; n < COLUMNS; n += 2) {
        float *low = out + n * LANES, *high = low + LANES;
        store_halves(totals[n], low, high);
        store_halves(totals[n + 1], low + HEADS, high + HEADS);
    }
}

// Many queries laid out for the unit: rows of 32 numbers for the heads of as many queries as a tile has room for, `span`
// rows each, or a query in several tiles. weights: of the rows, 0 where there is no head.
struct ManyQueries {
    int64_t span, each, tiles, steps;  // each: queries in a tile; tiles: of a query
    Space<uint16_t> space;
    uint16_t* numbers;
    std::vector<float> weights;

    // Of so many queries
    int64_t groups(int64_t count) const { return (count + each - 1) / each; }

    MATRIX void lay_out(const float* q, const float* weight, int64_t count, int64_t heads, int64_t width) {
        for (span = 1; span < heads && span < SIDE;) span *= 2;
        each = SIDE / span, tiles = (heads + SIDE - 1) / SIDE, steps = (width + DEPTH - 1) / DEPTH;
        const int64_t rows = groups(count) * tiles * SIDE;
        numbers = space.room(rows * steps * DEPTH);
        std::memset(numbers, 0, rows * steps * DEPTH * sizeof *numbers);
        weights.assign(rows, 0.f);
        for (int64_t i = 0; i < count; i++)
            for (int64_t h = 0; h < heads; h++) {
                const int64_t row = i / each * tiles * SIDE + i % each * span + h;
                weights[row] = weight[i * heads + h];
                for (int64_t k = 0; k < width; k += LANES) {
                    const __mmask16 there = width - k >= LANES ? 0xFFFF : (1 << (width - k)) - 1;
                    uint16_t* to = numbers + ((row / SIDE * steps + k / DEPTH) * SIDE + row % SIDE) * DEPTH + k % DEPTH;
                    store_rounded(to, (Lanes)_mm512_maskz_loadu_ps(there, q + (i * heads + h) * width + k));
                }
            }
    }
};

typedef float Products[COLUMNS][TILE / 2];

// products[n][i][j]: of row i of tile t and key 16 n + j. keys: in 64 columns, 16 after 16
MATRIX inline void multiply_columns(const ManyQueries& queries, int64_t t, const uint16_t* keys, Products products) {
    const int64_t next = queries.steps * TILE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < queries.steps; k++) {
        const uint16_t* key = keys + k * TILE;
        _tile_loadd(4, queries.numbers + (t * queries.steps + k) * TILE, 64);
        _tile_loadd(5, key, 64);
        _tile_loadd(6, key + next, 64);
        _tile_loadd(7, key + 2 * next, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(5, key + 3 * next, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, products[0], 64);
    _tile_stored(1, products[1], 64);
    _tile_stored(2, products[2], 64);
    _tile_stored(3, products[3], 64);
}

// The same of keys that are there in tiles 4 .. 7, where 32 numbers are all of one
MATRIX inline void multiply_loaded(const ManyQueries& queries, int64_t t, Products products) {
    _tile_loadd(3, queries.numbers + t * TILE, 64);
    _tile_zero(0);
    _tile_dpbf16ps(0, 3, 4);
    _tile_stored(0, products[0], 64);
    _tile_zero(1);
    _tile_dpbf16ps(1, 3, 5);
    _tile_stored(1, products[1], 64);
    _tile_zero(2);
    _tile_dpbf16ps(2, 3, 6);
    _tile_stored(2, products[2], 64);
    _tile_zero(0);
    _tile_dpbf16ps(0, 3, 7);
    _tile_stored(0, products[3], 64);
}

// out[i][s], rows of 64: the scores of 64 keys for each query; hits[i]: whether one of them is not below bars[i]. Those
// that fill the last tile are scored, too. scales: of the keys, or null.
MATRIX inline void score_columns(const ManyQueries& queries, int64_t count, const uint16_t* keys, const float* scales,
                                 const float* bars, float* out, bool* hits) {
    alignas(64) Products products;
    __m512 totals[COLUMNS] = {};
    const int64_t tiles = queries.groups(count) * queries.tiles;
    const bool loaded = queries.steps == 1;
    if (loaded) {
        _tile_loadd(4, keys, 64);
        _tile_loadd(5, keys + TILE, 64);
        _tile_loadd(6, keys + 2 * TILE, 64);
        _tile_loadd(7, keys + 3 * TILE, 64);
    }
    for (int64_t t = 0; t < tiles; t++) {
        if (loaded) multiply_loaded(queries, t, products);
        else multiply_columns(queries, t, keys, products);
        const float* weight = queries.weights.data() + t * SIDE;
        for (int64_t row = 0; row < SIDE;) {
            for (const int64_t stop = row + queries.span; row < stop; row++)
                for (int64_t n = 0; n < COLUMNS; n++) {
                    const __m512 product = _mm512_max_ps(_mm512_load_ps(products[n] + row * SIDE), _mm512_setzero_ps());
                    totals[n] = _mm512_fmadd_ps(product, _mm512_set1_ps(weight[row]), totals[n]);
                }
            if ((t + 1) % queries.tiles) continue;  // the query has more heads
            const __m512 bar = _mm512_set1_ps(*bars++);
            __mmask16 hit = 0;
            for (int64_t n = 0; n < COLUMNS; n++, out += SIDE) {
                if (scales) totals[n] = _mm512_mul_ps(totals[n], _mm512_loadu_ps(scales + n * SIDE));
                hit |= _mm512_cmp_ps_mask(totals[n], bar, _CMP_GE_OQ);
                _mm512_storeu_ps(out, totals[n]);
                totals[n] = _mm512_setzero_ps();
            }
            *hits++ = hit;
        }
    }
}

}  // namespace matrix

#endif
