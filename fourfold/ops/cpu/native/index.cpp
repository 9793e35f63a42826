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
#include "lanes.h"
#include "team.h"

namespace {

constexpr int64_t TILE = 8;    // queries that share widened keys
constexpr int64_t CHUNK = 64;  // keys widened at a time
constexpr int FOUR = 4;        // keys that share a load of the query

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

// Rows of all pages, each of `width` numbers; row s of sequence b lies in page pages[b][s / per_page].
struct Rows {
    const void* data;
    bool half;
    const int64_t* pages;
    int64_t n_pages, page_stride, per_page, width;

    // Rows first .. first + n - 1 of sequence b as floats
    void widen(int64_t b, int64_t first, int64_t n, float* to) const;
};

CLONES void widen_row(const void* from, bool half, int64_t n, float* to) {
    if (!half) {
        std::memcpy(to, from, n * sizeof(float));
        return;
    }
    const uint16_t* x = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; i++) to[i] = number(x[i]);
}

void Rows::widen(int64_t b, int64_t first, int64_t n, float* to) const {
    for (int64_t s = first; s < first + n;) {  // a page at a time: its rows lie side by side
        const int64_t row = s % per_page, together = std::min(per_page - row, first + n - s);
        const int64_t at = pages[b * n_pages + s / per_page] * page_stride + row * width;
        widen_row(static_cast<const char*>(data) + at * (half ? 2 : 4), half, together * width, to);
        to += together * width;
        s += together;
    }
}

// out[s] = sum_h weight[h] relu(q[h] . k[s]); q: [width, lanes], a lane per head, lanes a multiple of LANES
CLONES void score_keys(const float* q, const float* weight, int64_t lanes, int64_t width, const float* k, int64_t n, float* out) {
    for (int64_t s = 0; s < n; s += FOUR) {
        const float* row[FOUR];
        for (int j = 0; j < FOUR; j++) row[j] = k + std::min(s + j, n - 1) * width;
        Lanes total[FOUR] = {};
        for (int64_t h = 0; h < lanes; h += LANES) {
            Lanes dot[FOUR] = {};
            for (int64_t i = 0; i < width; i++) {
                const Lanes query = load(q + i * lanes + h);
                for (int j = 0; j < FOUR; j++) dot[j] += query * row[j][i];
            }
            for (int j = 0; j < FOUR; j++) total[j] += (dot[j] > 0.f ? dot[j] : Lanes{}) * load(weight + h);
        }
        for (int j = 0; j < FOUR && s + j < n; j++) out[s + j] = sum(total[j]);
    }
}

}  // namespace

// keys: rows of `width` numbers in pages, float or bfloat16; summaries: one such row for each `block` keys of a page,
// or null: every key is scored; past: int64 [batch], positions before the first query; blocks: how many a query may
// look into, its own among them. q: float [batch, queries, heads, width]; weights: float [batch, queries, heads].
// out: int64 [batch, queries, k], ascending positions, -1 after the last.
extern "C" void ff_select_positions(const void* keys, const void* summaries, int half, const int64_t* pages,
                                    int64_t n_pages, int64_t page_stride, int64_t summary_stride, int64_t page_size,
                                    int64_t block, int64_t blocks, const int64_t* past, const float* q, const float* weights,
                                    int64_t batch, int64_t queries, int64_t heads, int64_t width, int64_t k,
                                    int64_t* out, int threads) {
    const Rows all{keys, half != 0, pages, n_pages, page_stride, page_size, width};
    const int64_t lanes = (heads + LANES - 1) / LANES * LANES, tiles = (queries + TILE - 1) / TILE;
    in_parts(threads, int(batch * tiles), [&](int part) {
        const int64_t b = part / tiles, first = part % tiles * TILE, last = std::min(queries, first + TILE);
        static thread_local std::vector<float> turned, weight, wide, scores;
        turned.assign(TILE * width * lanes, 0.f);
        weight.assign(TILE * lanes, 0.f);
        wide.resize(std::max(CHUNK, block) * width);
        scores.resize(std::max(CHUNK, block));
        std::vector<Best> best, near;
        for (int64_t t = first; t < last; t++) {
            const int64_t at = (b * queries + t) * heads;
            for (int64_t h = 0; h < heads; h++) {
                weight[(t - first) * lanes + h] = weights[at + h];
                for (int64_t i = 0; i < width; i++)
                    turned[((t - first) * width + i) * lanes + h] = q[(at + h) * width + i];
            }
            best.push_back(Best{k});
        }
        // Offers the rows of `from` before end(t) to the collection of each query t
        auto stream = [&](const Rows& from, std::vector<Best>& to, auto end) {
            const int64_t stop = end(last - 1);
            for (int64_t s = 0; s < stop; s += CHUNK) {
                from.widen(b, s, std::min(CHUNK, stop - s), wide.data());
                for (int64_t t = first; t < last; t++) {
                    const int64_t n = std::min(CHUNK, end(t) - s), i = t - first;
                    if (n <= 0) continue;
                    score_keys(&turned[i * width * lanes], &weight[i * lanes], lanes, width, wide.data(), n, scores.data());
                    to[i].offer(scores.data(), n, s);
                }
            }
        };
        auto visible = [&](int64_t t) { return past[b] + t + 1; };
        if (!summaries || (past[b] + last - 1) / block < blocks) {  // no block is left out
            stream(all, best, visible);
        } else {
            near.assign(last - first, Best{blocks - 1});
            if (blocks > 1)
                stream(Rows{summaries, half != 0, pages, n_pages, summary_stride, page_size / block, width}, near,
                       [&](int64_t t) { return (past[b] + t) / block; });
            for (int64_t t = first; t < last; t++) {
                const int64_t i = t - first;
                near[i].sort_by_position();
                near[i].kept.emplace_back(0.f, (past[b] + t) / block);
                for (const Scored& found : near[i].kept) {
                    const int64_t start = found.second * block, n = std::min(block, visible(t) - start);
                    all.widen(b, start, n, wide.data());
                    score_keys(&turned[i * width * lanes], &weight[i * lanes], lanes, width, wide.data(), n, scores.data());
                    best[i].offer(scores.data(), n, start);
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
