// x / rms(x) * weight for a few rows, with the residual added first where there is one.
#include <algorithm>
#include <cmath>

#include "rows.h"
#include "team.h"

// x, out: float [rows, d]; weight: float [d] or null; residual: float [rows, d] or null, becomes residual + x
extern "C" void ff_rms_norm(const float* x, float* residual, const float* weight, float* out, int64_t rows,
                            int64_t d, float eps) {
    for (int64_t row = 0; row < rows; row++) {
        const float* from = x + row * d;
        float* to = out + row * d;
        if (residual) {
            float* both = residual + row * d;
            for (int64_t i = 0; i < d; i++) both[i] += from[i];
            from = both;
        }
        Lanes squares[4] = {};
        int64_t i = 0;
        for (; i + 4 * LANES <= d; i += 4 * LANES)
            for (int j = 0; j < 4; j++) {
                const Lanes v = load(from + i + j * LANES);
                squares[j] += v * v;
            }
        float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
        for (; i < d; i++) total += from[i] * from[i];
        const float factor = 1.f / std::sqrt(total / float(d) + eps);
        if (weight)
            for (int64_t j = 0; j < d; j++) to[j] = from[j] * factor * weight[j];
        else
            for (int64_t j = 0; j < d; j++) to[j] = from[j] * factor;
    }
}

namespace {

constexpr int64_t WORTH_A_PART = 1 << 14;  // numbers

void normalise(const uint16_t* from, const float* weight, uint16_t* to, int64_t d, float eps) {
    Lanes squares = {};
    for (int64_t i = 0; i < d; i += LANES) {
        const Lanes v = load_some(from + i, d - i);
        squares += v * v;
    }
    const float factor = 1.f / std::sqrt(sum(squares) / float(d) + eps);
    for (int64_t i = 0; i < d; i += LANES) {
        Lanes v = load_some(from + i, d - i) * factor;
        if (weight) v *= load_some(weight + i, d - i);
        store_some(to + i, v, d - i);
    }
}

}  // namespace

// x, out: bfloat16 [rows, d]; weight: float [d] or null
extern "C" void ff_half_rms_norm(const uint16_t* x, const float* weight, uint16_t* out, int64_t rows, int64_t d, float eps,
                                 int threads) {
    const int64_t each = std::max<int64_t>(1, WORTH_A_PART / d);
    in_parts(threads, int((rows + each - 1) / each), [&](int part) {
        for (int64_t row = part * each; row < std::min(rows, (part + 1) * each); row++)
            normalise(x + row * d, weight, out + row * d, d, eps);
    });
}
