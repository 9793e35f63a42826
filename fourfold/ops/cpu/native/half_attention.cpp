// Softmax attention of bfloat16 by the matrix unit, without a gradient.
//
// A block of queries takes the keys by sixteen neighbours, those of which some query sees one, and lays them out once
// for all heads of a group. A row of the products is one head of one query; 32 rows go through both products together.
// Scores, softmax and sums are float32; a probability is rounded before it meets its value, and divided after it.
#include <cmath>
#include <limits>

#include "matrix.h"
#include "team.h"

#ifdef HAS_MATRIX

namespace {

using matrix::DEPTH, matrix::SIDE, matrix::TILE, matrix::Space;

constexpr int64_t BLOCK = 64, STRIP = 32;  // queries of a block; rows of a product

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Keys by sixteens: which of them each query sees, a bit a key
struct Seen {
    std::vector<int64_t> sixteens;  // numbers of those of which some query sees a key, -1 to make them even
    std::vector<uint16_t> bits;     // [queries, sixteens]

    MATRIX void look(const uint8_t* visible, int64_t row, int64_t queries, int64_t keys) {
        const int64_t count = up_to(keys, SIDE) / SIDE;
        all.resize(queries * count), any.assign(count, 0);
        for (int64_t i = 0; i < queries; i++)
            for (int64_t j = 0; j < count; j++) {
                const int64_t left = keys - j * SIDE;
                const __mmask16 there = left >= SIDE ? 0xFFFF : (1 << left) - 1;
                const __m128i bytes = _mm_maskz_loadu_epi8(there, visible + i * row + j * SIDE);
                any[j] |= all[i * count + j] = _mm_test_epi8_mask(bytes, bytes);
            }
        sixteens.clear();
        for (int64_t j = 0; j < count; j++)
            if (any[j]) sixteens.push_back(j);
        if (sixteens.size() % 2) sixteens.push_back(-1);
        bits.clear();
        for (int64_t i = 0; i < queries; i++)
            for (const int64_t j : sixteens) bits.push_back(j < 0 ? 0 : all[i * count + j]);
    }

private:
    std::vector<uint16_t> all, any;
};

// 2^x to one part in 10^5
MATRIX inline __m512 power_of_two(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.33335581e-3f);
    for (const float c : {9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, whole);
}

// probs = e^(scale scores - the largest), rounded, 0 where not seen. Returns 1 / their sum, in which a sink has a share.
MATRIX float softmax(const float* scores, const uint16_t* bits, int64_t sixteens, float scale, const float* sink, uint16_t* probs) {
    constexpr float LOG2E = 1.44269504f, LEAST = -std::numeric_limits<float>::max();
    const __m512 factor = _mm512_set1_ps(scale * LOG2E);
    __m512 most = _mm512_set1_ps(LEAST), total = {};
    for (int64_t j = 0; j < sixteens; j++)
        most = _mm512_mask_max_ps(most, bits[j], most, _mm512_mul_ps(_mm512_loadu_ps(scores + j * SIDE), factor));
    float top = _mm512_reduce_max_ps(most);
    if (sink) top = std::max(top, *sink * LOG2E);
    const __m512 less = _mm512_set1_ps(top);
    for (int64_t j = 0; j < sixteens; j++) {
        const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + j * SIDE), factor, less);
        const __m512 p = _mm512_maskz_mov_ps(bits[j], power_of_two(x));
        total = _mm512_add_ps(total, p);
        matrix::store_rounded(probs + j * SIDE, (Lanes)p);
    }
    float sum = _mm512_reduce_add_ps(total);
    if (sink) sum += std::exp2(*sink * LOG2E - top);
    return 1 / std::max(sum, std::numeric_limits<float>::min());
}

struct Request {
    const uint16_t *q, *k, *v;
    const uint8_t* visible;
    int64_t visible_batch, visible_row;
    const float* sinks;
    uint16_t* out;
    int64_t L, S, heads, groups, d, dv;
    float scale;
};

// Queries first .. first + count - 1 of batch b, heads of group g
MATRIX void attend(const Request& r, int64_t b, int64_t g, int64_t first, int64_t count) {
    static thread_local Seen seen;
    static thread_local Space<uint16_t> key_space, value_space, query_space, prob_space;
    static thread_local Space<float> score_space, result_space;
    seen.look(r.visible + b * r.visible_batch + first * r.visible_row, r.visible_row, count, r.S);
    const int64_t sixteens = seen.sixteens.size(), steps = up_to(r.d, DEPTH) / DEPTH, depth = steps * DEPTH;
    const int64_t wide = up_to(r.dv, 2 * SIDE), value_tiles = wide / SIDE, pairs = sixteens / 2;
    uint16_t *keys = key_space.room(sixteens * steps * TILE), *values = value_space.room(pairs * value_tiles * TILE);
    for (int64_t p = 0; p < pairs; p++) {
        const uint16_t *key_rows[2 * SIDE], *value_rows[2 * SIDE];
        for (int64_t i = 0; i < 2 * SIDE; i++) {
            const int64_t sixteen = seen.sixteens[2 * p + i / SIDE], s = sixteen * SIDE + i % SIDE;
            const bool there = sixteen >= 0 && s < r.S;
            key_rows[i] = there ? r.k + ((b * r.S + s) * r.groups + g) * r.d : nullptr;
            value_rows[i] = there ? r.v + ((b * r.S + s) * r.groups + g) * r.dv : nullptr;
        }
        for (int64_t half = 0; half < 2; half++)
            matrix::lay_columns(key_rows + half * SIDE, r.d, keys + (2 * p + half) * steps * TILE);
        matrix::lay_rows(value_rows, r.dv, values + p * value_tiles * TILE);
    }
    const int64_t share = r.heads / r.groups, width = (sixteens + 1) * SIDE, row = (pairs + 1) * DEPTH;  // not powers of two
    uint16_t *query = query_space.room(STRIP * depth), *probs = prob_space.room(STRIP * row);
    float *scores = score_space.room(STRIP * width), *result = result_space.room(STRIP * wide), inverse[STRIP];
    matrix::configure();
    for (int64_t begin = 0; begin < count * share; begin += STRIP) {
        const int64_t rows = std::min(STRIP, count * share - begin);
        const auto place = [&](int64_t i) {  // of a row among all heads of all queries
            return (b * r.L + first + (begin + i) / share) * r.heads + g * share + (begin + i) % share;
        };
        for (int64_t i = 0; i < rows; i++) {
            std::memcpy(query + i * depth, r.q + place(i) * r.d, r.d * 2);
            std::memset(query + i * depth + r.d, 0, (depth - r.d) * 2);
        }
        for (int64_t j = 0; j < sixteens; j += 2)
            matrix::multiply(query, depth, keys + j * steps * TILE, TILE, steps * TILE, steps, scores + j * SIDE, width);
        for (int64_t i = 0; i < rows; i++)
            inverse[i] = softmax(scores + i * width, seen.bits.data() + (begin + i) / share * sixteens, sixteens, r.scale,
                                 r.sinks ? r.sinks + place(i) % r.heads : nullptr, probs + i * row);
        for (int64_t n = 0; n < value_tiles; n += 2)
            matrix::multiply(probs, row, values + n * TILE, value_tiles * TILE, TILE, pairs, result + n * SIDE, wide);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t n = 0; n < r.dv; n += LANES)
                matrix::store_rounded(r.out + place(i) * r.dv + n, load(result + i * wide + n) * inverse[i], r.dv - n);
    }
    matrix::release();
}

}  // namespace

#endif

// Whether there is a matrix unit that this process may use
extern "C" int ff_has_matrix() {
#ifdef HAS_MATRIX
    return matrix::is_there();
#else
    return 0;
#endif
}

// As ff_attention, of bfloat16 and without the logarithms; only where there is a matrix unit
extern "C" void ff_half_attention(const uint16_t* q, const uint16_t* k, const uint16_t* v, const uint8_t* visible,
                                  int64_t visible_batch, int64_t visible_row, const float* sinks, uint16_t* out,
                                  int64_t batch, int64_t L, int64_t S, int64_t heads, int64_t groups, int64_t d, int64_t dv,
                                  float scale, int threads) {
#ifdef HAS_MATRIX
    const Request request{q, k, v, visible, visible_batch, visible_row, sinks, out, L, S, heads, groups, d, dv, scale};
    const int64_t blocks = (L + BLOCK - 1) / BLOCK;
    in_parts(threads, int(batch * groups * blocks), [&](int part) {
        const int64_t first = part % blocks * BLOCK;
        attend(request, part / (groups * blocks), part / blocks % groups, first, std::min(BLOCK, L - first));
    });
#endif
}
