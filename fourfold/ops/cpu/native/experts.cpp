// Experts of a few tokens with weights that are not quantised: each row of a weight is read once for all its tokens.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "lanes.h"
#include "team.h"

namespace {

constexpr int64_t WORTH_A_PART = 1 << 15;  // products
constexpr int PARTS_PER_THREAD = 4;

template <class T> INLINE float dot(const T* w, const float* x, int64_t n) {
    Lanes sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; j++) sums[j] += load(w + i + j * LANES) * load(x + i + j * LANES);
    for (; i + LANES <= n; i += LANES) sums[0] += load(w + i) * load(x + i);
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; i++) total += number(w[i]) * x[i];
    return total;
}

void dots(const float* w, const float* x, int64_t n, float* out) { *out = dot(w, x, n); }
void dots(const uint16_t* w, const float* x, int64_t n, float* out) { *out = dot(w, x, n); }

// gate_up: [E, 2 width, d]; down: [E, d, width]; a token adds its experts in the order of their numbers
template <class T>
void experts(const T* gate_up, const T* down, const float* x, int64_t tokens, int64_t d, int64_t width,
             const int64_t* indices, const float* weights, int64_t per_token, float limit, float* y, int threads) {
    const int64_t pairs = tokens * per_token;
    std::vector<int64_t> order(pairs);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return indices[a] < indices[b]; });
    std::vector<float> hidden(pairs * width);
    // Calls body(pair, expert) for every row of [first, last), the pairs of an expert after each other
    const auto rows = [&](int64_t first, int64_t last, const auto& body) {
        for (int64_t begin = 0, end; begin < pairs; begin = end) {
            const int64_t expert = indices[order[begin]];
            for (end = begin; end < pairs && indices[order[end]] == expert;) end++;
            for (int64_t row = first; row < last; row++)
                for (int64_t i = begin; i < end; i++) body(order[i], expert, row);
        }
    };
    const auto parts_of = [&](int64_t count) {
        return int(std::clamp(pairs * d * width / WORTH_A_PART, int64_t(1),
                              std::min<int64_t>(count, int64_t(threads) * PARTS_PER_THREAD)));
    };
    int parts = parts_of(width);
    in_parts(threads, parts, [&](int part) {
        rows(width * part / parts, width * (part + 1) / parts, [&](int64_t pair, int64_t expert, int64_t row) {
            const float* from = x + pair / per_token * d;
            float g, u;
            dots(gate_up + (expert * 2 * width + row) * d, from, d, &g);
            dots(gate_up + (expert * 2 * width + width + row) * d, from, d, &u);
            if (limit > 0) g = std::min(g, limit), u = std::clamp(u, -limit, limit);
            hidden[pair * width + row] = g / (1 + std::exp(-g)) * u * weights[pair];
        });
    });
    parts = parts_of(d);
    in_parts(threads, parts, [&](int part) {
        const int64_t first = d * part / parts, last = d * (part + 1) / parts;
        for (int64_t t = 0; t < tokens; t++) std::fill(y + t * d + first, y + t * d + last, 0.f);
        rows(first, last, [&](int64_t pair, int64_t expert, int64_t row) {
            float one;
            dots(down + (expert * d + row) * width, hidden.data() + pair * width, width, &one);
            y[pair / per_token * d + row] += one;
        });
    });
}

}  // namespace

extern "C" void ff_plain_experts(int bfloat16, const void* gate_up, const void* down, const float* x, int64_t tokens,
                                 int64_t d, int64_t width, const int64_t* indices, const float* weights,
                                 int64_t per_token, float limit, float* y, int threads) {
    if (bfloat16)
        experts(static_cast<const uint16_t*>(gate_up), static_cast<const uint16_t*>(down), x, tokens, d, width, indices,
                weights, per_token, limit, y, threads);
    else
        experts(static_cast<const float*>(gate_up), static_cast<const float*>(down), x, tokens, d, width, indices,
                weights, per_token, limit, y, threads);
}
