// Softmax attention of many queries and its gradient, without ever holding the probabilities of all of them.
//
// A block of queries of one head reads only the keys that some of them see. Every product is one small kernel: A with
// any strides, broadcast, times B packed in panels of LANES columns. The backward pass computes the probabilities again.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lanes.h"
#include "team.h"

namespace {

constexpr int64_t BLOCK = 64;  // queries
// Rows of A that share the loads of B, and panels of B: their sums stay in the registers that there are
constexpr int64_t ROWS = LANES == 16 ? 8 : 4, PANELS = LANES == 16 ? 2 : 3;

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A query, key or value [batch, length, heads, width] and one head of one batch of it
struct Head {
    float* data;
    int64_t stride, width;
    Head(const float* all, int64_t length, int64_t heads, int64_t width, int64_t batch, int64_t head)
        : data(const_cast<float*>(all) + (batch * length * heads + head) * width), stride(heads * width), width(width) {}
    float* row(int64_t i) const { return data + i * stride; }
};

// c[m][n] = sum_k a(m, k) b(k, n) for ROWS rows and COUNT panels
template <int COUNT>
INLINE void tile(const float* a, int64_t row, int64_t column, const float* b, int64_t depth, float* c, int64_t width) {
    Lanes sums[ROWS][COUNT] = {};
    for (int64_t k = 0; k < depth; k++) {
        Lanes some[COUNT];
        for (int p = 0; p < COUNT; p++) some[p] = load(b + (p * depth + k) * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int p = 0; p < COUNT; p++) sums[r][p] += a[r * row + k * column] * some[p];
    }
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < COUNT; p++) store(c + r * width + p * LANES, sums[r][p]);
}

// c [rows, columns] of row length `width` = A B; rows a multiple of ROWS, columns of LANES
void multiply(const float* a, int64_t row, int64_t column, const float* b, int64_t rows, int64_t columns,
              int64_t depth, float* c, int64_t width) {
    int64_t n = 0;
    for (; n + PANELS * LANES <= columns; n += PANELS * LANES)
        for (int64_t m = 0; m < rows; m += ROWS)
            tile<PANELS>(a + m * row, row, column, b + n * depth, depth, c + m * width + n, width);
    for (; n < columns; n += LANES)
        for (int64_t m = 0; m < rows; m += ROWS)
            tile<1>(a + m * row, row, column, b + n * depth, depth, c + m * width + n, width);
}

struct Block {
    int64_t first, count, rows;  // queries, and how many with those that fill up
    std::vector<int64_t> keys;
    int64_t columns, width;       // keys with those that fill up; length of a row of scores
    std::vector<uint8_t> any, seen;  // [keys]; [count, columns]
    std::vector<float> scores, other, query, key_columns, value_columns, panels, result;
};

// Rows of x as a matrix with a row each: panels of its columns, its width filled up with zeros
void pack_rows(const Head& x, const int64_t* which, int64_t first, int64_t count, int64_t depth, std::vector<float>& to) {
    const int64_t width = up_to(x.width, LANES);
    to.assign(width * depth, 0.f);
    for (int64_t i = 0; i < count; i++) {
        const float* from = x.row(which ? which[i] : first + i);
        for (int64_t n = 0; n < x.width; n++) to[(n / LANES * depth + i) * LANES + n % LANES] = from[n];
    }
}

// Rows of x as a matrix with a column each
void pack_columns(const Head& x, const std::vector<int64_t>& which, int64_t columns, std::vector<float>& to) {
    to.assign(columns * x.width, 0.f);
    for (int64_t i = 0; i < int64_t(which.size()); i++) {
        const float* from = x.row(which[i]);
        float* panel = to.data() + i / LANES * x.width * LANES + i % LANES;
        for (int64_t k = 0; k < x.width; k++) panel[k * LANES] = from[k];
    }
}

void copy_rows(const Head& x, const Block& block, std::vector<float>& to) {
    to.assign(block.rows * x.width, 0.f);
    for (int64_t i = 0; i < block.count; i++)
        std::copy_n(x.row(block.first + i), x.width, to.data() + i * x.width);
}

// Which keys the block sees, and which query sees which of them
void look(Block& block, const uint8_t* visible, int64_t row, int64_t first, int64_t queries, int64_t keys) {
    const int64_t count = std::min(BLOCK, queries - first);
    block.first = first, block.count = count, block.rows = up_to(count, ROWS);
    block.any.assign(keys, 0), block.keys.resize(keys);
    uint8_t* any = block.any.data();
    for (int64_t i = 0; i < count; i++) {
        const uint8_t* from = visible + (first + i) * row;
        for (int64_t s = 0; s < keys; s++) any[s] |= from[s];
    }
    int64_t n = 0, *which = block.keys.data();
    for (int64_t s = 0; s < keys; s++) which[n] = s, n += any[s];
    block.keys.resize(n);
    const int64_t columns = up_to(n, LANES);
    block.columns = columns, block.width = columns + LANES;  // rows a power of two apart would share cache sets
    block.seen.resize(count * columns);
    const bool together = n && which[n - 1] - which[0] == n - 1;
    for (int64_t i = 0; i < count; i++) {
        const uint8_t* from = visible + (first + i) * row;
        uint8_t* to = block.seen.data() + i * columns;
        if (together)
            std::memcpy(to, from + which[0], n);
        else
            for (int64_t c = 0; c < n; c++) to[c] = from[which[c]];
        std::memset(to + n, 0, columns - n);
    }
    block.scores.resize(block.rows * block.width), block.other.resize(block.rows * block.width);
}

Block& scratch() {
    static thread_local Block block;
    return block;
}

INLINE IntLanes is_seen(const uint8_t* from) {
    ByteLanes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, IntLanes) != 0;
}

// scores become probabilities; returns the logarithm of what they were divided by
float softmax(float* scores, const uint8_t* seen, int64_t columns, float scale, const float* sink) {
    constexpr float LEAST = -std::numeric_limits<float>::max();
    Lanes most = Lanes{} + LEAST;
    for (int64_t c = 0; c < columns; c += LANES) {
        Lanes s = load(scores + c) * scale;
        s = is_seen(seen + c) ? s : Lanes{} + LEAST;
        most = s > most ? s : most;
        store(scores + c, s);
    }
    float top = sink ? *sink : LEAST;
    for (int i = 0; i < LANES; i++) top = std::max(top, most[i]);
    Lanes totals = {};
    for (int64_t c = 0; c < columns; c += LANES) {
        const Lanes p = is_seen(seen + c) ? exponential(load(scores + c) - top) : Lanes{};
        totals += p;
        store(scores + c, p);
    }
    float total = sum(totals);
    if (sink) total += std::exp(*sink - top);
    total = std::max(total, std::numeric_limits<float>::min());
    for (int64_t c = 0; c < columns; c += LANES) store(scores + c, load(scores + c) * (1 / total));
    return top + std::log(total);
}

// scores become probabilities, and the gradients of these the gradients of the products q . k
void softmax_gradient(float* scores, float* gradient, const uint8_t* seen, int64_t columns, float scale,
                      float log, float inner) {
    for (int64_t c = 0; c < columns; c += LANES) {
        const Lanes p = is_seen(seen + c) ? exponential(load(scores + c) * scale - log) : Lanes{};
        store(gradient + c, p * (load(gradient + c) - inner) * scale);
        store(scores + c, p);
    }
}

float dot(const float* a, const float* b, int64_t n) {
    Lanes sums = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += load(a + i) * load(b + i);
    float total = sum(sums);
    for (; i < n; i++) total += a[i] * b[i];
    return total;
}

// x[key] += rows, for each key of the block
void add_rows(const Head& x, const Block& block) {
    const int64_t width = up_to(x.width, LANES);
    for (int64_t i = 0; i < int64_t(block.keys.size()); i++) {
        float* to = x.row(block.keys[i]);
        for (int64_t n = 0; n < x.width; n++) to[n] += block.result[i * width + n];
    }
}

void write_rows(const Head& x, const Block& block) {
    const int64_t width = up_to(x.width, LANES);
    for (int64_t i = 0; i < block.count; i++)
        std::copy_n(block.result.data() + i * width, x.width, x.row(block.first + i));
}

}  // namespace

// q: [batch, L, heads, d]; k, v: [batch, S, groups, d | dv]; visible: bytes, of the given strides; sinks: [heads] or
// null. Fills out [batch, L, heads, dv] and logs [batch, L, heads].
extern "C" void ff_attention(const float* q, const float* k, const float* v, const uint8_t* visible,
                             int64_t visible_batch, int64_t visible_row, const float* sinks, float* out, float* logs,
                             int64_t batch, int64_t L, int64_t S, int64_t heads, int64_t groups, int64_t d, int64_t dv,
                             float scale, int threads) {
    const int64_t blocks = (L + BLOCK - 1) / BLOCK, share = heads / groups;
    in_parts(threads, int(batch * groups * blocks), [&](int part) {
        Block& block = scratch();
        const int64_t b = part / (groups * blocks), g = part / blocks % groups, width = up_to(dv, LANES);
        const Head keys(k, S, groups, d, b, g), values(v, S, groups, dv, b, g);
        look(block, visible + b * visible_batch, visible_row, part % blocks * BLOCK, L, S);
        pack_columns(keys, block.keys, block.columns, block.key_columns);
        pack_rows(values, block.keys.data(), 0, block.keys.size(), block.columns, block.panels);
        block.result.resize(block.rows * width);
        for (int64_t h = g * share; h < (g + 1) * share; h++) {
            copy_rows(Head(q, L, heads, d, b, h), block, block.query);
            multiply(block.query.data(), d, 1, block.key_columns.data(), block.rows, block.columns, d,
                     block.scores.data(), block.width);
            for (int64_t i = 0; i < block.count; i++)
                logs[(b * L + block.first + i) * heads + h] = softmax(block.scores.data() + i * block.width,
                    block.seen.data() + i * block.columns, block.columns, scale, sinks ? sinks + h : nullptr);
            multiply(block.scores.data(), block.width, 1, block.panels.data(), block.rows, width, block.columns,
                     block.result.data(), width);
            write_rows(Head(out, L, heads, dv, b, h), block);
        }
    });
}

// The gradients of q, and of k and v for each head apart [batch, S, heads, d | dv], which begin as zeros.
// Fills inner [batch, L, heads] with out . gradient.
extern "C" void ff_attention_backward(const float* q, const float* k, const float* v, const uint8_t* visible,
                                      int64_t visible_batch, int64_t visible_row, const float* out, const float* logs,
                                      const float* gradient, float* inner, float* dq, float* dk, float* dv_,
                                      int64_t batch, int64_t L, int64_t S, int64_t heads, int64_t groups, int64_t d,
                                      int64_t dv, float scale, int threads) {
    in_parts(threads, int(batch * heads), [&](int part) {
        Block& block = scratch();
        const int64_t b = part / heads, h = part % heads, g = h / (heads / groups);
        const Head queries(q, L, heads, d, b, h), keys(k, S, groups, d, b, g), values(v, S, groups, dv, b, g);
        const Head gradients(gradient, L, heads, dv, b, h), outs(out, L, heads, dv, b, h), dqueries(dq, L, heads, d, b, h);
        const Head dkeys(dk, S, heads, d, b, h), dvalues(dv_, S, heads, dv, b, h);
        const int64_t wide = up_to(d, LANES), wide_v = up_to(dv, LANES);
        for (int64_t first = 0; first < L; first += BLOCK) {
            look(block, visible + b * visible_batch, visible_row, first, L, S);
            const int64_t rows = block.rows, columns = block.columns, width = block.width;
            float *scores = block.scores.data(), *dscores = block.other.data();
            block.result.resize(std::max(rows, columns) * std::max(wide, wide_v));
            copy_rows(queries, block, block.query);
            pack_columns(keys, block.keys, columns, block.key_columns);
            multiply(block.query.data(), d, 1, block.key_columns.data(), rows, columns, d, scores, width);
            copy_rows(gradients, block, block.query);
            pack_columns(values, block.keys, columns, block.value_columns);
            multiply(block.query.data(), dv, 1, block.value_columns.data(), rows, columns, dv, dscores, width);
            for (int64_t i = 0; i < block.count; i++) {
                const int64_t at = (b * L + first + i) * heads + h;
                inner[at] = dot(outs.row(first + i), gradients.row(first + i), dv);
                softmax_gradient(scores + i * width, dscores + i * width, block.seen.data() + i * columns, columns,
                                 scale, logs[at], inner[at]);
            }
            pack_rows(keys, block.keys.data(), 0, block.keys.size(), columns, block.panels);
            multiply(dscores, width, 1, block.panels.data(), rows, wide, columns, block.result.data(), wide);
            write_rows(dqueries, block);
            pack_rows(queries, nullptr, first, block.count, block.count, block.panels);
            multiply(dscores, 1, width, block.panels.data(), columns, wide, block.count, block.result.data(), wide);
            add_rows(dkeys, block);
            pack_rows(gradients, nullptr, first, block.count, block.count, block.panels);
            multiply(scores, 1, width, block.panels.data(), columns, wide_v, block.count, block.result.data(), wide_v);
            add_rows(dvalues, block);
        }
    });
}
