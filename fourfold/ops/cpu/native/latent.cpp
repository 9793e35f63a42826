// Absorbed multi-head latent attention for one query of each sequence, over cached rows wherever they lie.
//
// Three passes: W_UK folded into the query of each head; keys in chunks of fixed size, each with its own softmax
// (so that the result does not depend on the number of threads); chunks merged and W_UV applied.
// A tile of keys is brought into the nearest cache once for all heads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"
#include "team.h"

namespace {

constexpr int64_t CHUNK = 128;  // keys
constexpr int KEYS = LANES, FOUR = 4;  // keys in a tile; heads, keys or vectors that share a load

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// to[0 .. width - 1] = the numbers of a part of a row times its scale
void widen(const void* part, int format, float scale, int64_t width, float* to) {
    switch (format) {
        case FLOAT32: std::memcpy(to, part, width * sizeof(float)); return;
        case BFLOAT16: return widen_as(static_cast<const uint16_t*>(part), 1.f, width, to);
        case INT8: return widen_as(static_cast<const int8_t*>(part), scale, width, to);
        default: return widen_as(static_cast<const Fp8*>(part), scale, width, to);
    }
}

// score[h][s] = q[h] . k[s]; heads a multiple of 4, keys [KEYS, width], width a multiple of LANES
void tile_scores(const float* q, const float* k, int64_t heads, int64_t width, float* score) {
    for (int64_t h = 0; h < heads; h += FOUR)
        for (int s = 0; s < KEYS; s += FOUR) {
            Lanes dot[FOUR][FOUR] = {};
            for (int64_t i = 0; i < width; i += LANES) {
                Lanes key[FOUR];
                for (int b = 0; b < FOUR; b++) key[b] = load(k + (s + b) * width + i);
                for (int a = 0; a < FOUR; a++) {
                    const Lanes query = load(q + (h + a) * width + i);
                    for (int b = 0; b < FOUR; b++) dot[a][b] += query * key[b];
                }
            }
            for (int a = 0; a < FOUR; a++)
                for (int b = 0; b < FOUR; b++) score[(h + a) * KEYS + s + b] = sum(dot[a][b]);
        }
}

// The softmax goes on: scores become weights relative to the largest so far, and what was gathered shrinks with it
void tile_softmax(float* score, int there, int64_t heads, int64_t latent, float* most, float* total, float* out) {
    for (int64_t h = 0; h < heads; h++) {
        float* s = score + h * KEYS;
        for (int i = there; i < KEYS; i++) s[i] = -INFINITY;
        float top = most[h];
        for (int i = 0; i < there; i++) top = std::max(top, s[i]);
        Lanes weight = exponential(load(s) - top);
        for (int i = there; i < KEYS; i++) weight[i] = 0;
        store(s, weight);
        if (top > most[h]) {
            const float shrink = std::exp(most[h] - top);
            total[h] *= shrink;
            for (int64_t i = 0; i < latent; i += LANES) store(out + h * latent + i, load(out + h * latent + i) * shrink);
            most[h] = top;
        }
        total[h] += sum(weight);
    }
}

// out[h] += sum_s weight[h][s] k[s][0 .. latent - 1]; VECTORS of LANES at a time
template <int VECTORS>
INLINE void gather_columns(const float* weight, const float* k, int64_t heads, int64_t width, int64_t latent, float* out) {
    for (int64_t h = 0; h < heads; h += FOUR) {
        Lanes acc[FOUR][VECTORS];
        for (int a = 0; a < FOUR; a++)
            for (int v = 0; v < VECTORS; v++) acc[a][v] = load(out + (h + a) * latent + v * LANES);
        for (int s = 0; s < KEYS; s++) {
            Lanes key[VECTORS];
            for (int v = 0; v < VECTORS; v++) key[v] = load(k + s * width + v * LANES);
            for (int a = 0; a < FOUR; a++)
                for (int v = 0; v < VECTORS; v++) acc[a][v] += weight[(h + a) * KEYS + s] * key[v];
        }
        for (int a = 0; a < FOUR; a++)
            for (int v = 0; v < VECTORS; v++) store(out + (h + a) * latent + v * LANES, acc[a][v]);
    }
}

void tile_gather(const float* weight, const float* k, int64_t heads, int64_t width, int64_t latent, float* out) {
    int64_t i = 0;
    for (; i + FOUR * LANES <= latent; i += FOUR * LANES)
        gather_columns<FOUR>(weight, k + i, heads, width, latent, out + i);
    for (; i < latent; i += LANES) gather_columns<1>(weight, k + i, heads, width, latent, out + i);
}

// out[r] = sum_n q[n] w[n][r]
template <class T> INLINE void fold_rows(const T* w, const float* q, int64_t n, int64_t latent, float* out) {
    std::fill(out, out + latent, 0.f);
    for (int64_t row = 0; row < n; row++) {
        const T* from = w + row * latent;
        int64_t r = 0;
        for (; r + LANES <= latent; r += LANES) store(out + r, load(out + r) + q[row] * load(from + r));
        for (; r < latent; r++) out[r] += q[row] * number(from[r]);
    }
}

// out[v] = w[v] . x
template <class T> INLINE void unfold_rows(const T* w, const float* x, int64_t n, int64_t latent, float* out) {
    for (int64_t row = 0; row < n; row++) {
        const T* from = w + row * latent;
        Lanes dot[2] = {};
        int64_t r = 0;
        for (; r + 2 * LANES <= latent; r += 2 * LANES)
            for (int j = 0; j < 2; j++) dot[j] += load(x + r + j * LANES) * load(from + r + j * LANES);
        float total = sum(dot[0] + dot[1]);
        for (; r < latent; r++) total += x[r] * number(from[r]);
        out[row] = total;
    }
}

void fold(const void* w, bool half, int64_t first, const float* q, int64_t n, int64_t latent, float* out) {
    if (half) fold_rows(static_cast<const uint16_t*>(w) + first * latent, q, n, latent, out);
    else fold_rows(static_cast<const float*>(w) + first * latent, q, n, latent, out);
}

void unfold(const void* w, bool half, int64_t first, const float* x, int64_t n, int64_t latent, float* out) {
    if (half) unfold_rows(static_cast<const uint16_t*>(w) + first * latent, x, n, latent, out);
    else unfold_rows(static_cast<const float*>(w) + first * latent, x, n, latent, out);
}

}  // namespace

// q: float [batch, heads, nope] and [batch, heads, rope]; expansions: [heads, nope + v, latent], W_UK before W_UV, or
// null: then q is [batch, heads, latent] already, and so is the output. Otherwise out: float [batch, heads, v].
// keys: in a format of rows.h. Row number s of sequence b begins at element pages[b * pages_stride + s / page_size] *
// page_stride, and s % page_size rows of the two parts (latent, rope) after that.
// indices: int64 [batch, count] of the rows to see, or null: 0 .. count - 1; valid: bool [batch, count] or null.
extern "C" void ff_latent_attention(const void* keys, int format, const int64_t* pages, int64_t pages_stride,
                                    int64_t page_stride, int64_t page_size, const int64_t* indices,
                                    const uint8_t* valid, int64_t count, const float* q, const float* q_rope, const void* expansions, int half_expansions,
                                    int64_t batch, int64_t heads, int64_t nope, int64_t rope, int64_t v, int64_t latent,
                                    float scale, float* out, int threads) {
    const int64_t wide = up_to(latent, LANES), width = wide + up_to(rope, LANES), rows = up_to(heads, FOUR);
    const int64_t chunks = std::max<int64_t>(1, (count + CHUNK - 1) / CHUNK), item = item_bytes(format);
    const int64_t row_size = row_bytes(format, latent + rope, 2), codes = scale_bytes(format, 2);
    static thread_local std::vector<float> kept_queries, kept_partial, kept_most, kept_total;
    auto &queries = kept_queries, &partial = kept_partial, &most = kept_most, &total = kept_total;
    queries.assign(batch * rows * width, 0.f);
    partial.assign(batch * chunks * rows * wide, 0.f);
    most.assign(batch * chunks * rows, -INFINITY);
    total.assign(batch * chunks * rows, 0.f);

    const int by_head = batch * heads * nope * latent > 1 << 18 ? int(heads) : 1;
    in_parts(threads, by_head, [&](int part) {
        for (int64_t h = heads * part / by_head; h < heads * (part + 1) / by_head; h++)
            for (int64_t b = 0; b < batch; b++) {
                float* to = &queries[(b * rows + h) * width];
                if (expansions) fold(expansions, half_expansions, h * (nope + v), q + (b * heads + h) * nope, nope, latent, to);
                else std::copy_n(q + (b * heads + h) * latent, latent, to);
                std::copy_n(q_rope + (b * heads + h) * rope, rope, to + wide);
                for (int64_t i = 0; i < width; i++) to[i] *= scale;
            }
    });

    in_parts(threads, int(batch * chunks), [&](int part) {
        const int64_t b = part / chunks, first = part % chunks * CHUNK, last = std::min(count, first + CHUNK);
        static thread_local std::vector<float> tile, score;
        tile.assign(KEYS * width, 0.f);
        score.resize(rows * KEYS);
        for (int64_t s = first; s < last;) {
            int there = 0;
            for (; s < last && there < KEYS; s++) {
                if (valid && !valid[b * count + s]) continue;
                const int64_t row = indices ? indices[b * count + s] : s;
                const char* from = static_cast<const char*>(keys) + row % page_size * row_size +
                                   pages[b * pages_stride + row / page_size] * page_stride * item;
                float* to = tile.data() + there++ * width;
                widen(from + codes, format, scale_of(from, format, 0), latent, to);
                widen(from + codes + latent * item, format, scale_of(from, format, 1), rope, to + wide);
            }
            if (!there) continue;
            float *m = &most[part * rows], *l = &total[part * rows], *o = &partial[part * rows * wide];
            std::fill(tile.begin() + there * width, tile.end(), 0.f);
            tile_scores(&queries[b * rows * width], tile.data(), rows, width, score.data());
            tile_softmax(score.data(), there, rows, wide, m, l, o);
            tile_gather(score.data(), tile.data(), rows, width, wide, o);
        }
    });

    const int64_t each = expansions ? v : latent;
    in_parts(threads, by_head, [&](int part) {
        std::vector<float> merged(wide);
        for (int64_t h = heads * part / by_head; h < heads * (part + 1) / by_head; h++)
            for (int64_t b = 0; b < batch; b++) {
                float top = -INFINITY, sums = 0;
                for (int64_t c = 0; c < chunks; c++) top = std::max(top, most[(b * chunks + c) * rows + h]);
                std::fill(merged.begin(), merged.end(), 0.f);
                for (int64_t c = 0; c < chunks; c++) {
                    const int64_t at = (b * chunks + c) * rows + h;
                    const float share = std::exp(most[at] - top);
                    if (!(total[at] > 0)) continue;
                    sums += share * total[at];
                    for (int64_t i = 0; i < latent; i++) merged[i] += share * partial[at * wide + i];
                }
                for (int64_t i = 0; i < latent; i++) merged[i] /= sums;
                float* to = out + (b * heads + h) * each;
                if (expansions) unfold(expansions, half_expansions, h * (nope + v) + nope, merged.data(), v, latent, to);
                else std::copy_n(merged.data(), latent, to);
            }
    });
}
