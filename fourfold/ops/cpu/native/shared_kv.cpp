// Keys come in chunks of fixed size, each with a softmax of its own, so that the result does not depend on the number
// of threads or on other sequences. A tile of keys meets all heads while it is in the nearest cache.
#include "shared_kv.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "lanes.h"
#include "team.h"

namespace {

constexpr int64_t CHUNK = 128, KEYS = LANES, EIGHT = 8, FOUR = 4;  // keys; keys of a tile; heads; heads or vectors

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// to[i][s] = rows[s][i] for KEYS rows; width a multiple of LANES
void lay_columns(const float* const* rows, int64_t width, float* to) {
    for (int64_t i = 0; i < width; i += LANES) {
        Lanes tile[LANES];
        for (int s = 0; s < LANES; s++) tile[s] = load(rows[s] + i);
        transpose(tile);
        for (int j = 0; j < LANES; j++) store(to + (i + j) * KEYS, tile[j]);
    }
}

// score[h][s] = q[h] . k[s]; heads a multiple of EIGHT
void tile_scores(const float* q, const float* columns, int64_t heads, int64_t width, float* score) {
    for (int64_t h = 0; h < heads; h += EIGHT) {
        Lanes dot[EIGHT] = {};
        for (int64_t i = 0; i < width; i++) {
            const Lanes key = load(columns + i * KEYS);
            for (int a = 0; a < EIGHT; a++) dot[a] += q[(h + a) * width + i] * key;
        }
        for (int a = 0; a < EIGHT; a++) store(score + (h + a) * KEYS, dot[a]);
    }
}

// Scores become weights relative to the largest so far, and what was gathered shrinks with it
void tile_softmax(float* score, int64_t there, int64_t heads, int64_t width, float* most, float* total, float* out) {
    for (int64_t h = 0; h < heads; h++) {
        float* s = score + h * KEYS;
        for (int64_t i = there; i < KEYS; i++) s[i] = -INFINITY;
        float top = most[h];
        for (int i = 0; i < KEYS; i++) top = std::max(top, s[i]);
        Lanes weight = exponential(load(s) - top);
        for (int64_t i = there; i < KEYS; i++) weight[i] = 0;
        store(s, weight);
        if (top > most[h]) {
            const float shrink = std::exp(most[h] - top);
            total[h] *= shrink;
            for (int64_t i = 0; i < width; i += LANES) store(out + h * width + i, load(out + h * width + i) * shrink);
            most[h] = top;
        }
        total[h] += sum(weight);
    }
}

template <int VECTORS>
INLINE void gather_columns(const float* weight, const float* const* rows, int64_t first, int64_t heads, int64_t width, float* out) {
    for (int64_t h = 0; h < heads; h += FOUR) {
        Lanes acc[FOUR][VECTORS];
        for (int a = 0; a < FOUR; a++)
            for (int v = 0; v < VECTORS; v++) acc[a][v] = load(out + (h + a) * width + first + v * LANES);
        for (int s = 0; s < KEYS; s++) {
            Lanes key[VECTORS];
            for (int v = 0; v < VECTORS; v++) key[v] = load(rows[s] + first + v * LANES);
            for (int a = 0; a < FOUR; a++)
                for (int v = 0; v < VECTORS; v++) acc[a][v] += weight[(h + a) * KEYS + s] * key[v];
        }
        for (int a = 0; a < FOUR; a++)
            for (int v = 0; v < VECTORS; v++) store(out + (h + a) * width + first + v * LANES, acc[a][v]);
    }
}

// out[h] += sum_s weight[h][s] rows[s]
void tile_gather(const float* weight, const float* const* rows, int64_t heads, int64_t width, float* out) {
    int64_t i = 0;
    for (; i + FOUR * LANES <= width; i += FOUR * LANES) gather_columns<FOUR>(weight, rows, i, heads, width, out);
    for (; i < width; i += LANES) gather_columns<1>(weight, rows, i, heads, width, out);
}

}  // namespace

void attend_shared(const SharedKeys* keys, int64_t batch, const float* q, const float* sinks, int64_t heads,
                   int64_t width, float scale, float* out, int threads) {
    const int64_t wide = up_to(width, LANES), rows = up_to(heads, EIGHT);
    static thread_local std::vector<float> kept_queries, kept_partial, kept_most, kept_total;
    auto &queries = kept_queries, &partial = kept_partial, &most = kept_most, &total = kept_total;
    queries.assign(batch * rows * wide, 0.f);
    std::vector<int64_t> first(batch + 1, 0);  // the first chunk of each sequence
    for (int64_t b = 0; b < batch; b++) {
        first[b + 1] = first[b] + (keys[b].count() + CHUNK - 1) / CHUNK;
        for (int64_t h = 0; h < heads; h++)
            for (int64_t i = 0; i < width; i++) queries[(b * rows + h) * wide + i] = q[(b * heads + h) * width + i] * scale;
    }
    const int64_t chunks = first[batch];
    partial.assign(chunks * rows * wide, 0.f);
    most.assign(chunks * rows, -INFINITY);
    total.assign(chunks * rows, 0.f);

    in_parts(threads, int(chunks), [&](int part) {
        const int64_t b = std::upper_bound(first.begin(), first.end(), part) - first.begin() - 1;
        const SharedKeys& from = keys[b];
        const int64_t start = (part - first[b]) * CHUNK, stop = std::min(from.count(), start + CHUNK);
        static thread_local std::vector<float> widened, columns, score;
        widened.assign(KEYS * wide, 0.f), columns.resize(wide * KEYS), score.resize(rows * KEYS);
        float *m = &most[part * rows], *l = &total[part * rows], *o = &partial[part * rows * wide];
        for (int64_t s = start; s < stop; s += KEYS) {
            const int64_t there = std::min(KEYS, stop - s);
            const float* row[KEYS];
            for (int64_t i = 0; i < KEYS; i++) {
                const int64_t number = std::min(s + i, stop - 1);  // the last one fills up, with weight 0
                bool ready = wide == width;
                Array it;
                if (number < from.recent) it = {from.tail + number * width, 0};
                else if (number == from.recent) it = {from.own, 0};
                else {
                    int64_t entry = number - from.recent - 1;
                    if (from.chosen) entry = from.chosen[entry];
                    it = from.pages.from(from.table[entry / from.per_page] * from.page_stride + entry % from.per_page * width);
                    ready = ready && !it.half;
                }
                row[i] = static_cast<const float*>(it.at);
                if (ready) continue;
                widen(it, width, widened.data() + i * wide);
                row[i] = widened.data() + i * wide;
            }
            lay_columns(row, wide, columns.data());
            tile_scores(&queries[b * rows * wide], columns.data(), rows, wide, score.data());
            tile_softmax(score.data(), there, rows, wide, m, l, o);
            tile_gather(score.data(), row, rows, wide, o);
        }
    });

    for (int64_t b = 0; b < batch; b++)
        for (int64_t h = 0; h < heads; h++) {
            float top = sinks[h], sums = 0;
            for (int64_t c = first[b]; c < first[b + 1]; c++) top = std::max(top, most[c * rows + h]);
            float* to = out + (b * heads + h) * width;
            std::fill(to, to + width, 0.f);
            for (int64_t c = first[b]; c < first[b + 1]; c++) {
                const float share = std::exp(most[c * rows + h] - top);
                const float* from = &partial[(c * rows + h) * wide];
                sums += share * total[c * rows + h];
                for (int64_t i = 0; i < width; i++) to[i] += share * from[i];
            }
            sums += std::exp(sinks[h] - top);
            for (int64_t i = 0; i < width; i++) to[i] /= sums;
        }
}
