// Experts of many tokens in bfloat16 by the matrix unit: rows of the weights as they lie times columns of tokens.
//
// The pairs of a token and an expert are sorted by expert and go through 32 at a time. Each product's result has a row
// for each of 32 outputs, and that is how the next one wants the hidden numbers: neighbours side by side.
#include <cmath>

#include "matrix.h"
#include "team.h"

#ifdef HAS_MATRIX

namespace {

using matrix::DEPTH, matrix::SIDE, matrix::TILE, matrix::Space;

constexpr int64_t BATCH = 2 * SIDE;  // pairs that share a read of the weights, and rows of those read together

struct Request {
    const uint16_t *gate_up, *down, *x;
    int64_t tokens, d, width, experts;
    const int64_t* indices;
    const float* weights;
    int64_t per_token;
    float limit;
    float* y;
};

// Batches of pairs with one expert each; what fills up is -1
struct Batches {
    std::vector<int64_t> pairs, experts;

    explicit Batches(const Request& r) {
        std::vector<int64_t> counts(r.experts), next(r.experts);
        const int64_t total = r.tokens * r.per_token;
        for (int64_t i = 0; i < total; i++) counts[r.indices[i]]++;
        for (int64_t e = 0; e < r.experts; e++) {
            next[e] = experts.size() * BATCH;
            experts.insert(experts.end(), (counts[e] + BATCH - 1) / BATCH, e);
        }
        pairs.assign(experts.size() * BATCH, -1);
        for (int64_t i = 0; i < total; i++) pairs[next[r.indices[i]]++] = i;
    }
};

MATRIX inline Lanes activate(const float* gate, const float* up, float limit) {
    Lanes g = load(gate), u = load(up);
    if (limit > 0) {
        g = g < limit ? g : Lanes{} + limit;
        u = u < limit ? u : Lanes{} + limit;
        u = u > -limit ? u : Lanes{} - limit;
    }
    return g * u / (1.f + exponential(-g));
}

// The hidden numbers of a batch, rounded, as B of the second product: sixteen pairs after the other
MATRIX void hide(const Request& r, const int64_t* pairs, int64_t expert, uint16_t* hidden) {
    static thread_local Space<uint16_t> space;
    const int64_t steps = r.d / DEPTH, half = r.width / DEPTH * TILE;
    uint16_t* x = space.room(2 * steps * TILE);
    const uint16_t* rows[BATCH];
    for (int64_t i = 0; i < BATCH; i++) rows[i] = pairs[i] < 0 ? nullptr : r.x + pairs[i] / r.per_token * r.d;
    matrix::lay_columns(rows, r.d, x);
    matrix::lay_columns(rows + SIDE, r.d, x + steps * TILE);
    alignas(64) float gate[BATCH * BATCH], up[BATCH * BATCH];
    const uint16_t* weight = r.gate_up + expert * 2 * r.width * r.d;
    for (int64_t f = 0; f < r.width; f += BATCH, weight += BATCH * r.d, hidden += TILE) {
        matrix::multiply(weight, r.d, x, TILE, steps * TILE, steps, gate, BATCH);
        matrix::multiply(weight + r.width * r.d, r.d, x, TILE, steps * TILE, steps, up, BATCH);
        for (int64_t i = 0; i < SIDE; i++)
            for (int64_t n = 0; n < 2; n++) {
                const int64_t at = 2 * i * BATCH + n * SIDE;
                matrix::store_side_by_side(hidden + n * half + i * DEPTH, activate(gate + at, up + at, r.limit),
                                           activate(gate + at + BATCH, up + at + BATCH, r.limit));
            }
    }
}

// y[token][out .. out + 31] += weight down hidden, for the pairs of a batch
MATRIX void add(const Request& r, const int64_t* pairs, int64_t expert, const uint16_t* hidden, int64_t out) {
    const int64_t steps = r.width / DEPTH;
    alignas(64) float product[BATCH * BATCH];
    matrix::multiply(r.down + (expert * r.d + out) * r.width, r.width, hidden, TILE, steps * TILE, steps, product, BATCH);
    for (int64_t n = 0; n < BATCH; n += SIDE)
        for (int64_t o = 0; o < BATCH; o += SIDE) {
            Lanes tile[SIDE];
            for (int64_t i = 0; i < SIDE; i++) tile[i] = load(product + (o + i) * BATCH + n);
            transpose(tile);
            for (int64_t i = 0; i < SIDE && pairs[n + i] >= 0; i++) {
                float* to = r.y + pairs[n + i] / r.per_token * r.d + out + o;
                store(to, load(to) + tile[i] * r.weights[pairs[n + i]]);
            }
        }
}

}  // namespace

#endif

// As ff_plain_experts, of bfloat16; d and width multiples of 32; only where there is a matrix unit
extern "C" void ff_half_experts(const uint16_t* gate_up, const uint16_t* down, const uint16_t* x, int64_t tokens, int64_t d,
                                int64_t width, int64_t experts, const int64_t* indices, const float* weights,
                                int64_t per_token, float limit, float* y, int threads) {
#ifdef HAS_MATRIX
    const Request request{gate_up, down, x, tokens, d, width, experts, indices, weights, per_token, limit, y};
    const Batches batches(request);
    const int64_t count = batches.experts.size(), size = BATCH * width;
    static thread_local Space<uint16_t> space;
    uint16_t* hidden = space.room(count * size);
    in_parts(threads, int(count), [&](int i) {
        matrix::configure();
        hide(request, batches.pairs.data() + i * BATCH, batches.experts[i], hidden + i * size);
        matrix::release();
    });
    in_parts(threads, int(d / BATCH), [&](int part) {  // a token adds its experts in the order of their numbers
        const int64_t out = part * BATCH;
        for (int64_t t = 0; t < tokens; t++) std::fill_n(y + t * d + out, BATCH, 0.f);
        matrix::configure();
        for (int64_t i = 0; i < count; i++)
            add(request, batches.pairs.data() + i * BATCH, batches.experts[i], hidden + i * size, out);
        matrix::release();
    });
#endif
}
