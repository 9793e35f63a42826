#include "products.h"

#include <algorithm>
#include <vector>

#include "lanes.h"
#include "team.h"

namespace {

constexpr int EIGHT = 8;  // rows of a weight that share the loads of x
constexpr int64_t WORTH_A_PART = 1 << 15;  // products

// y[r] = w[r] . x for ROWS rows of floats
template <int ROWS> INLINE void dots(const float* w, int64_t columns, const float* x, float* y) {
    Lanes sums[ROWS] = {};
    int64_t i = 0;
    for (; i + LANES <= columns; i += LANES) {
        const Lanes some = load(x + i);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sums[r] += some * load(w + r * columns + i);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        float total = sum(sums[r]);
        for (int64_t k = i; k < columns; k++) total += x[k] * w[r * columns + k];
        y[r] = total;
    }
}

// The same of bfloat16, two at a time: x comes with the even numbers of each 2 LANES before the odd ones
template <int ROWS> INLINE void dots(const uint16_t* w, int64_t columns, const float* x, float* y) {
    Lanes sums[ROWS] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= columns; i += 2 * LANES) {
        const Lanes even = load(x + i), odd = load(x + i + LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            WordLanes pairs;
            std::memcpy(&pairs, w + r * columns + i, sizeof pairs);
            sums[r] += even * (Lanes)(pairs << 16);
            sums[r] += odd * (Lanes)(pairs & 0xffff0000u);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        float total = sum(sums[r]);
        for (int64_t k = i; k < columns; k++) total += x[k] * number(w[r * columns + k]);
        y[r] = total;
    }
}

// Even numbers of each 2 LANES before the odd ones
INLINE void split_pairs(const float* x, int64_t columns, float* to) {
    int64_t i = 0;
    for (; i + 2 * LANES <= columns; i += 2 * LANES) {
        const Lanes a = load(x + i), b = load(x + i + LANES);
        store(to + i, __builtin_shuffle(a, b, 2 * counted()));
        store(to + i + LANES, __builtin_shuffle(a, b, 2 * counted() + 1));
    }
    for (; i < columns; i++) to[i] = x[i];
}

template <class T>
INLINE void product(const T* w, int64_t first, int64_t last, int64_t columns, const float* x, int64_t tokens,
                    int64_t x_step, float* y, int64_t y_step) {
    int64_t row = first;
    for (; row + EIGHT <= last; row += EIGHT)
        for (int64_t t = 0; t < tokens; t++) dots<EIGHT>(w + row * columns, columns, x + t * x_step, y + t * y_step + row);
    for (; row < last; row++)
        for (int64_t t = 0; t < tokens; t++) dots<1>(w + row * columns, columns, x + t * x_step, y + t * y_step + row);
}

}  // namespace

void product_rows(Array w, int64_t first, int64_t last, int64_t columns, const float* x, int64_t tokens,
                  int64_t x_step, float* y, int64_t y_step) {
    if (w.half) {
        static thread_local std::vector<float> kept;
        kept.resize(tokens * columns);
        for (int64_t t = 0; t < tokens; t++) split_pairs(x + t * x_step, columns, kept.data() + t * columns);
        product(static_cast<const uint16_t*>(w.at), first, last, columns, kept.data(), tokens, columns, y, y_step);
    } else product(static_cast<const float*>(w.at), first, last, columns, x, tokens, x_step, y, y_step);
}

void widen(Array from, int64_t n, float* to) {
    if (!from.half) {
        std::memcpy(to, from.at, n * sizeof(float));
        return;
    }
    const uint16_t* numbers = static_cast<const uint16_t*>(from.at);
    for (int64_t i = 0; i < n; i++) to[i] = number(numbers[i]);
}

void round_half(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
        std::memcpy(x + i, &bits, 4);
    }
}

// y [tokens, rows] = x W^T; w: [rows, columns], x: float [tokens, columns]
extern "C" void ff_linear(const void* w, int half, int64_t rows, int64_t columns, const float* x, int64_t tokens,
                          float* y, int threads) {
    const Array weight{w, half};
    const int parts = int(std::clamp(rows * columns * tokens / WORTH_A_PART, int64_t(1),
                                     std::min<int64_t>(std::max<int64_t>(rows / EIGHT, 1), threads * 4)));
    in_parts(threads, parts, [&](int part) {
        const int64_t groups = (rows + EIGHT - 1) / EIGHT;
        product_rows(weight, std::min(rows, groups * part / parts * EIGHT), std::min(rows, groups * (part + 1) / parts * EIGHT),
                     columns, x, tokens, columns, y, rows);
    });
}
