// The lightning indexer's selection, streamed: scores are looked at and forgotten, so that memory holds the k best
// of each query alone.
//
// With summaries of blocks of keys it goes in two levels: every summary before the blocks of the newest k keys is
// scored, and the keys of the best blocks and of those are gathered and scored exactly. Of equal scores the later one wins.
#include <algorithm>
#include <numeric>
#include <vector>

#include "best.h"
#include "index_matrix.h"
#include "kernels.h"
#include "rows.h"
#include "team.h"

namespace {

// Queries that share keys, CHUNK of them laid out at a time: few where each of them keeps many blocks
constexpr int64_t TILE = 128, TWO_LEVEL_TILE = 32, SMALLEST_TILE = 16;
constexpr int FOUR = 4, TWO = 2;  // heads that share a load of the keys; vectors of keys that share one of a query
static_assert(CHUNK % (TWO * LANES) == 0);
constexpr size_t AHEAD = 6;   // blocks that are fetched from memory while others are scored

// Rows of all pages, each of `width` numbers; row s of sequence b lies in page pages[b][s / per_page]. page_stride: in
// elements of the format.
struct Rows {
    const void* data;
    int format;
    const int64_t* pages;
    int64_t n_pages, page_stride, per_page, width;

    int64_t left(int64_t s) const { return per_page - s % per_page; }  // of its page from row s on
    // Rows of a page follow each other
    const char* row(int64_t b, int64_t s) const {
        return static_cast<const char*>(data) + pages[b * n_pages + s / per_page] * page_stride * item_bytes(format) +
               s % per_page * row_bytes(format, width, 1);
    }
};

// Rows first .. first + n - 1, of one page, will be read soon
INLINE void expect(const Rows& rows, int64_t b, int64_t first, int64_t n) {
    for (int64_t s = first, some; s < first + n; s += some) {
        some = std::min(first + n - s, rows.left(s));
        const char* from = rows.row(b, s);
        const int64_t bytes = some * row_bytes(rows.format, rows.width, 1);
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
    }
}

// As lay_out, of codes or numbers T
template <class T> INLINE void lay_out_as(const Rows& rows, int64_t b, int64_t first, int64_t n, float* to) {
    const int64_t size = row_bytes(rows.format, rows.width, 1);
    for (int64_t s = 0; s < n; s += LANES) {
        const int64_t there = std::min<int64_t>(LANES, n - s);
        const T* from[LANES];
        float scale[LANES];
        const char* row = rows.row(b, first + s);
        for (int64_t j = 0, left = rows.left(first + s); j < there; j++, row += size, left--) {
            if (!left) row = rows.row(b, first + s + j), left = rows.per_page;
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
            for (int64_t x = 0; x < some; x++) {
                float* lane = to + (i + x) * CHUNK + s;
                if (there == LANES) store(lane, tile[x]);
                else std::memcpy(lane, &tile[x], there * sizeof(float));
            }
        }
    }
}

// Rows first .. first + n - 1 of sequence b, n <= CHUNK, as floats with a lane per row: to[i][s], i < width
void lay_out(const Rows& rows, int64_t b, int64_t first, int64_t n, float* to) {
    switch (rows.format) {
        case FLOAT32: return lay_out_as<float>(rows, b, first, n, to);
        case BFLOAT16: return lay_out_as<uint16_t>(rows, b, first, n, to);
        case INT8: return lay_out_as<int8_t>(rows, b, first, n, to);
        default: return lay_out_as<Fp8>(rows, b, first, n, to);
    }
}

// totals[v] += weight[h] relu(q[h] . k) for HEADS heads and TWO times LANES keys
template <int HEADS> INLINE void add_heads(const float* q, const float* weight, int64_t width, const float* k, Lanes* totals) {
    Lanes dot[HEADS][TWO] = {};
    for (int64_t i = 0; i < width; i++) {
        Lanes key[TWO];
        for (int v = 0; v < TWO; v++) key[v] = load(k + i * CHUNK + v * LANES);
        for (int h = 0; h < HEADS; h++)
            for (int v = 0; v < TWO; v++) dot[h][v] += q[h * width + i] * key[v];
    }
    for (int h = 0; h < HEADS; h++)
        for (int v = 0; v < TWO; v++) totals[v] += weight[h] * (dot[h][v] > 0.f ? dot[h][v] : Lanes{});
}

// out[s] = sum_h weight[h] relu(q[h] . k[s]) for keys as laid out above, n of them filled up; heads are added up in their
// order, so a score never depends on what else is scored
void score_keys(const float* q, const float* weight, int64_t heads, int64_t width, const float* k, int64_t n, float* out) {
    for (int64_t s = 0; s < n; s += TWO * LANES) {
        Lanes totals[TWO] = {};
        int64_t h = 0;
        for (; h + FOUR <= heads; h += FOUR) add_heads<FOUR>(q + h * width, weight + h, width, k + s, totals);
        for (; h < heads; h++) add_heads<1>(q + h * width, weight + h, width, k + s, totals);
        for (int v = 0; v < TWO; v++) store(out + s + v * LANES, totals[v]);
    }
}

// Queries and keys as vectors of floats score them: CHUNK keys with a lane each.
struct ByLanes {
    typedef float Number;
    typedef Best<Plainly> Kept;
    const float *q, *weights;
    int64_t heads, width;
    std::vector<float> space;

    static int64_t depth(int64_t width) { return width; }
    // Rows first .. first + n - 1, n <= CHUNK, as all queries want them; scales: of codes, else not written
    static void lay(const Rows& rows, int64_t b, int64_t first, int64_t n, float* keys, float*) {
        lay_out(rows, b, first, n, keys);
    }
    void begin(const float* queries, const float* head_weights, int64_t, int64_t n_heads, int64_t n) {
        q = queries, weights = head_weights, heads = n_heads, width = n;
        space.resize(width * CHUNK);
    }
    // out[t][s], rows of CHUNK: the scores of n keys that are laid so, for the first `count` queries; scales: of codes;
    // hits[t]: whether one of them may be no less than bars[t]
    void score(const float* keys, const float*, int64_t count, int64_t n, const float*, float* out, bool* hits) const {
        for (int64_t t = 0; t < count; t++) score_query(keys, t, n, out + t * CHUNK), hits[t] = true;
    }
    // Rows first .. first + n - 1 become keys number `at` and following of those that one query looks at
    void gather(const Rows& rows, int64_t b, int64_t first, int64_t n, float*, int64_t at) {
        lay_out(rows, b, first, n, space.data() + at);
    }
    // out[s]: the scores of the n keys gathered, for query t
    void score_gathered(const float*, int64_t t, int64_t n, float* out) const { score_query(space.data(), t, n, out); }
    void score_query(const float* keys, int64_t t, int64_t n, float* out) const {
        score_keys(q + t * heads * width, weights + t * heads, heads, width, keys, n, out);
    }
    void end() {}
};

#ifdef HAS_MATRIX
// Codes as bfloat16, which holds them exactly
template <class T> INLINE void narrow(const char* from, int64_t width, uint16_t* to) {
    for (int64_t i = 0; i < width; i += LANES) {
        const Lanes some = load_some(reinterpret_cast<const T*>(from) + i, width - i);
        const HalfLanes half = __builtin_convertvector((WordLanes)some >> 16, HalfLanes);
        std::memcpy(to + i, &half, sizeof half);
    }
}

// The same for the matrix unit: keys as bfloat16, and the scales of codes beside them.
struct ByMatrix {
    typedef uint16_t Number;
    typedef Best<ByVectors> Kept;
    matrix::ManyQueries many;
    matrix::Queries queries;
    int64_t width;
    std::vector<uint16_t> space;

    static int64_t depth(int64_t width) { return (width + matrix::DEPTH - 1) / matrix::DEPTH * matrix::DEPTH; }
    MATRIX static void lay(const Rows& rows, int64_t b, int64_t first, int64_t n, uint16_t* keys, float* scales) {
        static thread_local std::vector<uint16_t> codes;
        const int64_t each = depth(rows.width);
        if (rows.format != BFLOAT16) {
            codes.assign(CHUNK * each, 0);
            take(rows, b, first, n, codes.data(), scales);
        }
        for (int64_t s = 0; s < CHUNK; s += matrix::SIDE) {
            const uint16_t* from[matrix::SIDE];
            for (int64_t i = 0; i < matrix::SIDE; i++) {
                from[i] = s + i >= n                ? nullptr
                          : rows.format == BFLOAT16 ? reinterpret_cast<const uint16_t*>(rows.row(b, first + s + i))
                                                    : codes.data() + (s + i) * each;
            }
            matrix::lay_columns(from, rows.width, keys + s * each);
        }
    }
    // Rows first .. first + n - 1 as rows; scales[i]: of row first + i
    MATRIX static void take(const Rows& rows, int64_t b, int64_t first, int64_t n, uint16_t* to, float* scales) {
        const int64_t each = depth(rows.width);
        if (rows.format == BFLOAT16 && each == rows.width && first % rows.per_page + n <= rows.per_page) {
            std::memcpy(to, rows.row(b, first), n * each * 2);
            return;
        }
        for (int64_t s = 0; s < n; s++, to += each) {
            const char *row = rows.row(b, first + s), *codes = row + scale_bytes(rows.format, 1);
            scales[s] = scale_of(row, rows.format, 0);
            if (rows.format == BFLOAT16) std::memcpy(to, codes, rows.width * 2);
            if (rows.format == INT8) narrow<int8_t>(codes, rows.width, to);
            if (rows.format == E4M3) narrow<Fp8>(codes, rows.width, to);
        }
    }
    MATRIX void begin(const float* q, const float* weights, int64_t count, int64_t heads, int64_t n) {
        matrix::configure();
        queries.lay_out(q, weights, count, heads, n);
        many.lay_out(q, weights, count, heads, n);
        width = n, space.assign(depth(width) * CHUNK, 0);
    }
    MATRIX void score(const uint16_t* keys, const float* scales, int64_t count, int64_t, const float* bars, float* out, bool* hits) const {
        matrix::score_columns(many, count, keys, scales, bars, out, hits);
    }
    void gather(const Rows& rows, int64_t b, int64_t first, int64_t n, float* scales, int64_t at) {
        take(rows, b, first, n, space.data() + at * depth(width), scales + at);
    }
    MATRIX void score_gathered(const float* scales, int64_t t, int64_t, float* out) const {
        matrix::score_one(queries, t, space.data(), out);
        for (int64_t i = 0; scales && i < CHUNK; i += LANES) store(out + i, load(out + i) * load(scales + i));
    }
    MATRIX void end() { matrix::release(); }
};
#endif

// What ff_select_positions is asked for
struct Request {
    Rows keys, summaries;  // without data where every key is scored
    int64_t block, blocks;
    const int64_t* past;
    int64_t ratio;
    float floor;  // a score of a key below counts as it
    const float *q, *weights, *block_q, *block_weights;
    int64_t batch, queries, heads, k;
    int64_t* out;

    int64_t seen(int64_t b, int64_t t) const { return (past[b] + t + 1) / ratio; }  // keys, by a query
    int64_t own_block(int64_t b, int64_t t) const { return std::max<int64_t>(seen(b, t) - 1, 0) / block; }
    int64_t newest_block(int64_t b, int64_t t) const { return std::max<int64_t>(seen(b, t) - k, 0) / block; }  // of the k
    bool in_two_levels(int64_t b, int64_t last) const { return summaries.data && own_block(b, last) >= blocks; }
};

// The summaries of a sequence as its queries want them, laid out once for all: CHUNK after CHUNK.
template <class Scoring> struct Summaries {
    std::vector<typename Scoring::Number> numbers;
    std::vector<float> scales;

    void lay_out(const Request& r, int64_t b, int threads) {
        if (!r.in_two_levels(b, r.queries - 1) || r.queries == 1) return;
        const int64_t count = r.own_block(b, r.queries - 1), chunks = (count + CHUNK - 1) / CHUNK;
        const int64_t size = Scoring::depth(r.keys.width) * CHUNK;
        numbers.resize(chunks * size), scales.resize(chunks * CHUNK);
        in_parts(threads, int(chunks), [&](int c) {
            const int64_t first = c * CHUNK, n = std::min(CHUNK, count - first);
            Scoring::lay(r.summaries, b, first, n, numbers.data() + c * size, scales.data() + first);
        });
    }
};

// Offers scores of rows to the collections of queries first .. last - 1 of sequence b, no more than a tile
template <class Scoring> struct Offers {
    typedef typename Scoring::Kept Kept;
    const Request& r;
    const int64_t b, first, count;
    const bool scaled;
    Scoring& scoring;
    float scores[TILE * CHUNK], scales[CHUNK], bars[TILE];
    uint32_t places[CHUNK];  // of the rows that are scored
    bool hits[TILE];

    Offers(const Request& r, int64_t b, int64_t first, int64_t last, const float* q, const float* weights)
        : r(r), b(b), first(first), count(last - first), scaled(r.keys.format >= INT8), scoring(space()) {
        const int64_t at = b * r.queries + first, width = r.keys.width;
        scoring.begin(q + at * r.heads * width, weights + at * r.heads, count, r.heads, width);
    }
    ~Offers() { scoring.end(); }
    static Scoring& space() {
        static thread_local Scoring scoring;
        return scoring;
    }
    // n scores, of rows at `places`
    void offer(Kept& collection, float* some, int64_t n, float floor) {
        for (int64_t i = 0; i < n; i++) some[i] = std::max(some[i], floor);
        collection.offer(some, places, n);
    }
    // The n rows that were gathered, to query t
    void offer_gathered(Kept& collection, int64_t t, int64_t n, float floor) {
        scoring.score_gathered(scaled ? scales : nullptr, t, n, scores);
        offer(collection, scores, n, floor);
    }
    // n rows from number s on, to the only query: nobody to lay them out for
    void offer_one(const Rows& rows, int64_t s, int64_t n, Kept& collection, float floor) {
        scoring.gather(rows, b, s, n, scales, 0);
        std::iota(places, places + CHUNK, uint32_t(s));
        offer_gathered(collection, 0, n, floor);
    }
    // n rows from number s on, laid out, to each query as far as it sees them: those before number seen(t)
    template <class Number, class Seen>
    void offer_all(const Number* rows, const float* row_scales, int64_t s, int64_t n, std::vector<Kept>& collections, float floor,
                   Seen seen) {
        std::iota(places, places + CHUNK, uint32_t(s));
        for (int64_t t = 0; t < count; t++) bars[t] = collections[t].least();
        scoring.score(rows, scaled ? row_scales : nullptr, count, n, bars, scores, hits);
        for (int64_t t = 0; t < count; t++) {
            const int64_t there = hits[t] ? std::min(n, seen(t) - s) : 0;
            if (there > 0) offer(collections[t], scores + t * CHUNK, there, floor);
        }
    }
};

// The best keys of queries first .. last - 1 among keys from .. until - 1
template <class Scoring>
std::vector<typename Scoring::Kept> best_keys(const Request& r, int64_t b, int64_t first, int64_t last, int64_t from,
                                              int64_t until) {
    Offers<Scoring> offers(r, b, first, last, r.q, r.weights);
    std::vector<typename Scoring::Kept> best(offers.count, typename Scoring::Kept(r.k, true));
    static thread_local std::vector<typename Scoring::Number> keys;
    keys.resize(Scoring::depth(r.keys.width) * CHUNK);
    for (int64_t s = from + (until - from - 1) / CHUNK * CHUNK; s >= from && s < until; s -= CHUNK) {
        const int64_t there = std::min(CHUNK, until - s);
        if (offers.count == 1) {
            offers.offer_one(r.keys, s, there, best[0], r.floor);
            continue;
        }
        Scoring::lay(r.keys, b, s, there, keys.data(), offers.scales);
        offers.offer_all(keys.data(), offers.scales, s, there, best, r.floor, [&](int64_t t) { return r.seen(b, first + t); });
    }
    return best;
}

// The best blocks among from .. until - 1, as far as they lie before those of a query's newest keys
template <class Scoring>
std::vector<typename Scoring::Kept> best_blocks(const Request& r, const Summaries<Scoring>& summaries, int64_t b, int64_t first,
                                                int64_t last, int64_t from, int64_t until) {
    Offers<Scoring> offers(r, b, first, last, r.block_q, r.block_weights);
    std::vector<typename Scoring::Kept> best(offers.count, typename Scoring::Kept(r.blocks - 1, true));
    const int64_t size = Scoring::depth(r.keys.width) * CHUNK;
    for (int64_t s = from + (until - from - 1) / CHUNK * CHUNK; s >= from && s < until && r.blocks > 1; s -= CHUNK) {
        if (r.queries == 1) {
            if (s > from) expect(r.summaries, b, s - CHUNK, CHUNK);
            offers.offer_one(r.summaries, s, std::min(CHUNK, until - s), best[0], -INFINITY);
            continue;
        }
        const auto* rows = summaries.numbers.data() + s / CHUNK * size;
        offers.offer_all(rows, summaries.scales.data() + s, s, CHUNK, best, -INFINITY,
                         [&](int64_t t) { return std::min(until, r.newest_block(b, first + t)); });
    }
    return best;
}

// The best keys of queries first .. last - 1 among those of their best blocks and of the blocks of their newest keys
template <class Scoring>
std::vector<typename Scoring::Kept> best_keys_of(const Request& r, int64_t b, int64_t first, int64_t last,
                                                 std::vector<typename Scoring::Kept>& blocks) {
    Offers<Scoring> offers(r, b, first, last, r.q, r.weights);
    std::vector<typename Scoring::Kept> best(offers.count, typename Scoring::Kept(r.k, false));
    std::vector<int64_t> chosen;
    for (int64_t t = 0; t < offers.count; t++) {
        blocks[t].list(chosen);
        for (int64_t i = r.newest_block(b, first + t); i <= r.own_block(b, first + t); i++) chosen.push_back(i);
        int64_t there = 0;  // keys gathered
        for (size_t i = 0; i < chosen.size(); i++) {
            if (i + AHEAD < chosen.size()) expect(r.keys, b, chosen[i + AHEAD] * r.block, r.block);
            const int64_t stop = std::min((chosen[i] + 1) * r.block, r.seen(b, first + t));
            for (int64_t s = chosen[i] * r.block, n; s < stop; s += n) {
                n = std::min(CHUNK - there, stop - s);
                offers.scoring.gather(r.keys, b, s, n, offers.scales, there);
                std::iota(offers.places + there, offers.places + there + n, uint32_t(s));
                if ((there += n) < CHUNK) continue;
                offers.offer_gathered(best[t], t, there, r.floor);
                there = 0;
            }
        }
        if (there) offers.offer_gathered(best[t], t, there, r.floor);
    }
    return best;
}

// To the queries of sequence b from `first` on
template <class Kept> void write(const Request& r, int64_t b, int64_t first, std::vector<Kept>& best) {
    std::vector<int64_t> chosen;
    int64_t* to = r.out + (b * r.queries + first) * r.k;
    for (size_t t = 0; t < best.size(); t++, to += r.k) {
        best[t].list(chosen);
        std::sort(chosen.begin(), chosen.end());
        std::fill(std::copy(chosen.begin(), chosen.end(), to), to + r.k, -1);
    }
}

template <class Scoring> void select_all(const Request& r, int threads) {
    std::vector<Summaries<Scoring>> summaries(r.batch);
    for (int64_t b = 0; b < r.batch; b++) summaries[b].lay_out(r, b, threads);
    const int64_t most = r.summaries.data ? TWO_LEVEL_TILE : TILE, share = (r.batch * r.queries + threads - 1) / threads;
    const int64_t tile = std::max(SMALLEST_TILE, std::min(most, share / SMALLEST_TILE * SMALLEST_TILE));
    const int64_t tiles = (r.queries + tile - 1) / tile, parts = r.batch * tiles;
    // A few queries alone: what they score first is shared out
    const int64_t cuts = std::max<int64_t>(1, threads / std::max<int64_t>(parts, 1));
    std::vector<std::vector<typename Scoring::Kept>> found(parts * cuts);
    in_parts(threads, int(parts * cuts), [&](int i) {
        const int64_t b = i / cuts / tiles, first = i / cuts % tiles * tile, last = std::min(r.queries, first + tile);
        const bool in_blocks = r.in_two_levels(b, last - 1);
        const int64_t all = in_blocks ? r.newest_block(b, last - 1) : r.seen(b, last - 1);
        const int64_t each = (all / cuts + CHUNK) / CHUNK * CHUNK, from = std::min(all, i % cuts * each);
        const int64_t until = std::min(all, from + each);
        found[i] = in_blocks ? best_blocks<Scoring>(r, summaries[b], b, first, last, from, until)
                             : best_keys<Scoring>(r, b, first, last, from, until);
    });
    in_parts(threads, int(parts), [&](int part) {
        const int64_t b = part / tiles, first = part % tiles * tile, last = std::min(r.queries, first + tile);
        auto& best = found[part * cuts];
        for (size_t t = 0; t < best.size(); t++)
            for (int64_t i = 1; i < cuts; i++) best[t].add(found[part * cuts + i][t]);
        if (r.in_two_levels(b, last - 1)) best = best_keys_of<Scoring>(r, b, first, last, best);
        write(r, b, first, best);
    });
}

}  // namespace

// keys: rows of `width` numbers in pages, in a format of rows.h; page_stride, summary_stride: in elements; summaries:
// one such row for each `block` keys of a page, or null: every key is scored; past: int64 [batch], positions before
// the first query; ratio: positions that a key stands for, which is seen from the last of them on; floor: a score of
// a key below counts as it; blocks: one more than a query may look into before its newest k keys; q: float [batch, queries, heads, width];
// weights: float [batch, queries, heads]; block_q, block_weights: the same for summaries, or null; vectors: whether a
// matrix unit is left aside. out: int64 [batch, queries, k], ascending, -1 after the last.
extern "C" void ff_select_positions(const void* keys, const void* summaries, int format, const int64_t* pages,
                                    int64_t n_pages, int64_t page_stride, int64_t summary_stride, int64_t page_size,
                                    int64_t block, int64_t blocks, const int64_t* past, int64_t ratio, float floor, const float* q,
                                    const float* weights, const float* block_q, const float* block_weights, int64_t batch,
                                    int64_t queries, int64_t heads, int64_t width, int64_t k, int64_t* out, int vectors,
                                    int threads) {
    const Request request{{keys, format, pages, n_pages, page_stride, page_size, width},
                          {summaries, format, pages, n_pages, summary_stride, page_size / block, width},
                          block, blocks, past, ratio, floor,
                          q, weights, block_q, block_weights, batch, queries, heads, k, out};
#ifdef HAS_MATRIX
    if (!vectors && format != FLOAT32 && matrix::is_there()) return select_all<ByMatrix>(request, threads);
#endif
    select_all<ByLanes>(request, threads);
}
