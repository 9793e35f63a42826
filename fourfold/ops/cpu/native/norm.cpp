// x / rms(x) * weight for a few rows, with the residual added first where there is one.
#include <cmath>

#include "clones.h"
#include "lanes.h"

// x, out: float [rows, d]; weight: float [d] or null; residual: float [rows, d] or null, becomes residual + x
extern "C" CLONES void ff_rms_norm(const float* x, float* residual, const float* weight, float* out, int64_t rows,
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
