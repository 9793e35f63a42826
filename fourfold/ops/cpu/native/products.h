// Products of a few rows with weights that are not quantised, as fast as these can be read.
#pragma once

#include <cstdint>

struct Array {  // float, or bfloat16 where `half`; null where there is none
    const void* at;
    int64_t half;

    explicit operator bool() const { return at != nullptr; }
    Array from(int64_t number) const { return {static_cast<const char*>(at) + number * (half ? 2 : 4), half}; }
};

// y[t][row] = w[row] . x[t] for rows first .. last - 1 of w [.., columns]. A number never depends on what is beside it.
void product_rows(Array w, int64_t first, int64_t last, int64_t columns, const float* x, int64_t tokens, int64_t x_step,
                  float* y, int64_t y_step);

// to[0 .. n - 1] = the numbers of an array
void widen(Array from, int64_t n, float* to);

// Rounded as bfloat16 would hold it
void round_half(float* x, int64_t n);
