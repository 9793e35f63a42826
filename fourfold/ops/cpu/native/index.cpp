// The lightning indexer's selection, streamed: scores are looked at and forgotten, so that memory holds the k best
// of each query alone.
//
// With summaries of blocks of keys it goes in two levels: every summary before the query's own block is scored, and
// the keys of the best blocks and of its own are scored exactly. Keys are visited in their order, so that of equal
// scores the later one wins without being asked for.
#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

#include "clones.h"
#include "rows.h"
#include "team.h"

namespace {

constexpr int64_t TILE = 16;   // queries that share keys laid out once
constexpr int64_t CHUNK = 64;  // keys laid out at a time
constexpr int EIGHT = 8;       // heads that share a load of the keys

typedef std::pair<float, int64_t> Scored;  // pairs compare by score, then by position

// The k best of what is offered in ascending order of position.
struct Best {
    int64_t k;
    float bar = -INFINITY;
    std::vector<Scored> kept;

    void offer(const float* scores, int64_t n, int64_t first) {
        for (int64_t i = 0; i < n; i++) {
            if (!(scores[i] >= bar)) continue;
            kept.emplace_back(scores[i], first + i);
            if (int64_t(kept.size()) >= 2 * k) trim();
        }
    }
    void trim() {
        if (int64_t(kept.size()) <= k) return;
        std::nth_element(kept.begin(), kept.begin() + k - 1, kept.end(), std::greater<Scored>());
        kept.resize(k);
        bar = kept[k - 1].first;
    }
    void sort_by_position() {
        trim();
        std::sort(kept.begin(), kept.end(), [](const Scored& a, const Scored& b) { return a.second < b.second; });
    }
};

// Rows of all pages, each of `width` numbers; row s of sequence b lies in page pages[b][s / per_page]. page_stride: in
// elements of the format.
struct Rows {
    const void* data;
    int format;
    const int64_t* pages;
    int64_t n_pages, page_stride, per_page, width;

    const char* row(int64_t b, int64_t s) const {
        return static_cast<const char*>(data) + pages[b * n_pages + s / per_page] * page_stride * item_bytes(format) +
               s % per_page * row_bytes(format, width, 1);
    }
};

// As lay_out, of codes or numbers T
template <class T> INLINE void lay_out_as(const Rows& rows, int64_t b, int64_t first, int64_t n, float* to) {
    for (int64_t s = 0; s < n; s += LANES) {
        const int64_t there = std::min<int64_t>(LANES, n - s);
        const T* from[LANES];
        float scale[LANES];
        for (int64_t j = 0; j < there; j++) {
            const char* row = rows.row(b, first + s + j);
            scale[j] = scale_of(row, rows.format, 0);
            from[j] = reinterpret_cast<const T*>(row + scale_bytes(rows.format, 1));
        }
        for (int64_t i = 0; i < rows.width; i += LANES) {
            Lanes tile[LANES] = {};
            const int64_t some = std::min<int64_t>(LANES, rows.width - i);
            for (int64_t j = 0; j < there; j++) {
                tile[j] = load_some(from[j] + i, some);
                if (sizeof(T) == 1) tile[j] *= scale[j];
            }
            transpose(tile);
            for (int64_t x = 0; x < some; x++) store(to + (i + x) * CHUNK + s, tile[x]);
        }
    }
}

// Rows first .. first + n - 1 of sequence b, n <= CHUNK, as floats with a lane per row: to[i][s], i < width
CLONES void lay_out(const Rows& rows, int64_t b, int64_t first, int64_t n, float* to) {
    switch (rows.format) {
        case FLOAT32: return lay_out_as<float>(rows, b, first, n, to);
        case BFLOAT16: return lay_out_as<uint16_t>(rows, b, first, n, to);
        case INT8: return lay_out_as<int8_t>(rows, b, first, n, to);
        default: return lay_out_as<Fp8>(rows, b, first, n, to);
    }
}

// total += weight[h] relu(q[h] . k) for HEADS heads and sixteen keys
template <int HEADS> INLINE Lanes add_heads(const float* q, const float* weight, int64_t width, const float* k, Lanes total) {
    Lanes dot[HEADS] = {};
    for (int64_t i = 0; i < width; i++) {
        const Lanes key = load(k + i * CHUNK);
        for (int h = 0; h < HEADS; h++) dot[h] += q[h * width + i] * key;
    }
    for (int h = 0; h < HEADS; h++) total += weight[h] * (dot[h] > 0.f ? dot[h] : Lanes{});
    return total;
}

// out[s] = sum_h weight[h] relu(q[h] . k[s]) for keys as laid out above; heads are added up in their order, so a
// score never depends on what else is scored
CLONES void score_keys(const float* q, const float* weight, int64_t heads, int64_t width, const float* k, int64_t n, float* out) {
    for (int64_t s = 0; s < n; s += LANES) {
        Lanes total = {};
        int64_t h = 0;
        for (; h + EIGHT <= heads; h += EIGHT)
            total = add_heads<EIGHT>(q + h * width, weight + h, width, k + s, total);
        for (; h < heads; h++) total = add_heads<1>(q + h * width, weight + h, width, k + s, total);
        store(out + s, total);
    }
}

}  // namespace

// keys: rows of `width` numbers in pages, in a format of rows.h; page_stride, summary_stride: in elements; summaries: one such row for each `block` keys of a page,
// or null: every key is scored; past: int64 [batch], positions before the first query; blocks: how many a query may
// look into, its own among them. q: float [batch, queries, heads, width]; weights: float [batch, queries, heads].
// out: int64 [batch, queries, k], ascending positions, -1 after the last.
extern "C" void ff_select_positions(const void* keys, const void* summaries, int format, const int64_t* pages,
                                    int64_t n_pages, int64_t page_stride, int64_t summary_stride, int64_t page_size,
                                    int64_t block, int64_t blocks, const int64_t* past, const float* q, const float* weights,
                                    int64_t batch, int64_t queries, int64_t heads, int64_t width, int64_t k,
                                    int64_t* out, int threads) {
    const Rows all{keys, format, pages, n_pages, page_stride, page_size, width};
    const int64_t tiles = (queries + TILE - 1) / TILE;
    in_parts(threads, int(batch * tiles), [&](int part) {
        const int64_t b = part / tiles, first = part % tiles * TILE, last = std::min(queries, first + TILE);
        static thread_local std::vector<float> laid, scores;
        laid.resize(width * CHUNK);
        scores.resize(CHUNK);
        std::vector<Best> best(last - first, Best{k}), near(last - first, Best{blocks - 1});
        // Offers keys or summaries start .. stop - 1 to the collection of each query t, up to its own end(t)
        auto stream = [&](const Rows& from, int64_t start, int64_t stop, int64_t t, int64_t until, auto& to, auto end) {
            for (int64_t s = start; s < stop; s += CHUNK) {
                const int64_t there = std::min(CHUNK, stop - s);
                lay_out(from, b, s, there, laid.data());
                for (int64_t each = t; each < until; each++) {
                    const int64_t n = std::min(there, end(each) - s), at = (b * queries + each) * heads;
                    if (n <= 0) continue;
                    score_keys(q + at * width, weights + at, heads, width, laid.data(), n, scores.data());
                    to[each - first].offer(scores.data(), n, s);
                }
            }
        };
        auto visible = [&](int64_t t) { return past[b] + t + 1; };
        auto own_block = [&](int64_t t) { return (past[b] + t) / block; };
        if (!summaries || own_block(last - 1) < blocks) {  // no block is left out
            stream(all, 0, visible(last - 1), first, last, best, visible);
        } else {
            const Rows means{summaries, format, pages, n_pages, summary_stride, page_size / block, width};
            if (blocks > 1) stream(means, 0, own_block(last - 1), first, last, near, own_block);
            for (int64_t t = first; t < last; t++) {
                near[t - first].sort_by_position();
                near[t - first].kept.emplace_back(0.f, own_block(t));
                for (const Scored& found : near[t - first].kept) {
                    const int64_t start = found.second * block;
                    stream(all, start, std::min(start + block, visible(t)), t, t + 1, best, visible);
                }
            }
        }
        for (int64_t t = first; t < last; t++) {
            best[t - first].sort_by_position();
            int64_t* to = out + (b * queries + t) * k;
            for (const Scored& found : best[t - first].kept) *to++ = found.second;
            std::fill(to, out + (b * queries + t + 1) * k, -1);
        }
    });
}
