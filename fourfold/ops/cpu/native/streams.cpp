// Hyper-connections that nobody learns from: the maps of a site, reading the streams, mixing them (arXiv 2512.24880).
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "rows.h"
#include "team.h"

namespace {

constexpr int64_t WORTH_A_PART = 1 << 16;  // numbers that a part reads
constexpr int MOST = 8;                    // streams

template <class T> INLINE float dot_as(const T* a, const T* b, int64_t n) {
    Lanes sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (int j = 0; j < 2; j++) sums[j] += load(a + i + j * LANES) * load(b + i + j * LANES);
    float total = sum(sums[0] + sums[1]);
    for (; i < n; i++) total += number(a[i]) * number(b[i]);
    return total;
}
float dot(const float* a, const float* b, int64_t n) { return dot_as(a, b, n); }
float dot(const uint16_t* a, const uint16_t* b, int64_t n) { return dot_as(a, b, n); }

template <class T> float inverse_norm(const T* x, int64_t width, float eps) {
    return 1.f / std::sqrt(dot(x, x, width) / float(width) + eps);
}

float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }

// A row softmax, then columns and rows in turn, ending on columns
template <int N> void sinkhorn(float* m, int iterations, float eps) {
    for (int row = 0; row < N; row++) {
        float* it = m + row * N;
        const float top = *std::max_element(it, it + N);
        float total = 0;
        for (int k = 0; k < N; k++) total += it[k] = std::exp(it[k] - top);
        for (int k = 0; k < N; k++) it[k] = it[k] / total + eps;
    }
    for (int pass = 0; pass < iterations; pass++) {
        if (pass)
            for (int row = 0; row < N; row++) {
                float total = eps;
                for (int k = 0; k < N; k++) total += m[row * N + k];
                for (int k = 0; k < N; k++) m[row * N + k] /= total;
            }
        float totals[N];
        for (int k = 0; k < N; k++) totals[k] = eps;
        for (int row = 0; row < N; row++)
            for (int k = 0; k < N; k++) totals[k] += m[row * N + k];
        for (int row = 0; row < N; row++)
            for (int k = 0; k < N; k++) m[row * N + k] /= totals[k];
    }
}

using Sinkhorn = void (*)(float*, int, float);
constexpr Sinkhorn by_streams[MOST] = {sinkhorn<1>, sinkhorn<2>, sinkhorn<3>, sinkhorn<4>,
                                       sinkhorn<5>, sinkhorn<6>, sinkhorn<7>, sinkhorn<8>};

// The maps of a token, of what its streams are multiplied to
void maps_of(const float* base, const float* scale, const float* mixed, int n, float inverse, int iterations,
             float eps, float* pre, float* post, float* comb) {
    const auto hidden = [&](int k, int part) { return mixed[k] * inverse * scale[part] + base[k]; };
    for (int k = 0; k < n; k++) pre[k] = sigmoid(hidden(k, 0)) + eps;
    for (int k = 0; k < n; k++) post[k] = 2 * sigmoid(hidden(n + k, 1));
    for (int k = 0; k < n * n; k++) comb[k] = hidden(2 * n + k, 2);
    by_streams[n - 1](comb, iterations, eps);
}

template <class T> INLINE void read_as(const T* x, const float* pre, int n, int64_t d, T* out) {
    for (int64_t i = 0; i < d; i += LANES) {
        Lanes total = pre[0] * load_some(x + i, d - i);
        for (int j = 1; j < n; j++) total += pre[j] * load_some(x + j * d + i, d - i);
        store_some(out + i, total, d - i);
    }
}
void read_one(const float* x, const float* pre, int n, int64_t d, float* out) { read_as(x, pre, n, d, out); }
void read_one(const uint16_t* x, const float* pre, int n, int64_t d, uint16_t* out) { read_as(x, pre, n, d, out); }

template <int N, class T>
INLINE void mix_streams(const T* x, const T* y, const float* post, const float* comb, int64_t d, T* out) {
    for (int64_t i = 0; i < d; i += LANES) {
        Lanes streams[N];
        for (int j = 0; j < N; j++) streams[j] = load_some(x + j * d + i, d - i);
        const Lanes written = load_some(y + i, d - i);
        for (int k = 0; k < N; k++) {
            Lanes total = comb[k] * streams[0];
            for (int j = 1; j < N; j++) total += comb[j * N + k] * streams[j];
            store_some(out + k * d + i, total + post[k] * written, d - i);
        }
    }
}
template <class T>
INLINE void mix_as(const T* x, const T* y, const float* post, const float* comb, int n, int64_t d, T* out) {
    switch (n) {
        case 1: return mix_streams<1>(x, y, post, comb, d, out);
        case 2: return mix_streams<2>(x, y, post, comb, d, out);
        case 3: return mix_streams<3>(x, y, post, comb, d, out);
        case 4: return mix_streams<4>(x, y, post, comb, d, out);
        case 5: return mix_streams<5>(x, y, post, comb, d, out);
        case 6: return mix_streams<6>(x, y, post, comb, d, out);
        case 7: return mix_streams<7>(x, y, post, comb, d, out);
        default: return mix_streams<MOST>(x, y, post, comb, d, out);
    }
}
void mix_one(const float* x, const float* y, const float* post, const float* comb, int n, int64_t d, float* out) {
    mix_as(x, y, post, comb, n, d, out);
}
void mix_one(const uint16_t* x, const uint16_t* y, const float* post, const float* comb, int n, int64_t d,
             uint16_t* out) {
    mix_as(x, y, post, comb, n, d, out);
}

void collapse_one(const float* x, const float* fn, const float* base, float scale, int n, int64_t d, float eps,
                         float norm_eps, float* out) {
    const int64_t width = n * d;
    const float inverse = inverse_norm(x, width, norm_eps);
    float pre[MOST];
    for (int k = 0; k < n; k++) pre[k] = sigmoid(dot(x, fn + k * width, width) * inverse * scale + base[k]) + eps;
    read_one(x, pre, n, d, out);
}

template <class Body> void each_row(int threads, int64_t rows, int64_t numbers, const Body& body) {
    const int parts = int(std::clamp(rows * numbers / WORTH_A_PART, int64_t(1), std::max<int64_t>(rows, 1)));
    in_parts(threads, parts, [&](int part) {
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; row++) body(row);
    });
}

}  // namespace

extern "C" {

// x: [rows, n d]; fn: [n (n + 2), n d]; mixed: x fn^T if it is known, else null; pre, post: [rows, n]; comb: [rows, n, n]
void ff_hyper_maps(const float* x, const float* fn, const float* base, const float* scale, const float* mixed,
                   int64_t rows, int n, int64_t width, int iterations, float eps, float norm_eps, float* pre,
                   float* post, float* comb, int threads) {
    const int outputs = n * (n + 2);
    each_row(threads, rows, mixed ? width + 4096 : width * outputs, [&](int64_t row) {
        const float *from = x + row * width, *known = mixed ? mixed + row * outputs : nullptr;
        float some[MOST * (MOST + 2)];
        for (int k = 0; !known && k < outputs; k++) some[k] = dot(from, fn + k * width, width);
        maps_of(base, scale, known ? known : some, n, inverse_norm(from, width, norm_eps), iterations, eps, pre + row * n,
                post + row * n, comb + row * n * n);
    });
}

// The same of bfloat16 streams, mixed known
void ff_half_hyper_maps(const uint16_t* x, const float* base, const float* scale, const float* mixed, int64_t rows, int n,
                        int64_t width, int iterations, float eps, float norm_eps, float* pre, float* post, float* comb,
                        int threads) {
    each_row(threads, rows, width + 4096, [&](int64_t row) {
        maps_of(base, scale, mixed + row * n * (n + 2), n, inverse_norm(x + row * width, width, norm_eps), iterations, eps,
                pre + row * n, post + row * n, comb + row * n * n);
    });
}

// x: [rows, n, d]; fn: [n, n d]; base: [n]; scale: [1]; out: [rows, d]
void ff_collapse_streams(const float* x, const float* fn, const float* base, const float* scale, int64_t rows, int n,
                         int64_t d, float eps, float norm_eps, float* out) {
    for (int64_t row = 0; row < rows; row++)
        collapse_one(x + row * n * d, fn, base, *scale, n, d, eps, norm_eps, out + row * d);
}

// x: [rows, n, d]; pre: [rows, n]; out: [rows, d]
void ff_read_streams(const float* x, const float* pre, int64_t rows, int n, int64_t d, float* out, int threads) {
    each_row(threads, rows, n * d, [&](int64_t row) { read_one(x + row * n * d, pre + row * n, n, d, out + row * d); });
}

// x, out: [rows, n, d]; y: [rows, d]; post: [rows, n]; comb: [rows, n, n]
void ff_mix_streams(const float* x, const float* y, const float* post, const float* comb, int64_t rows, int n, int64_t d,
                    float* out, int threads) {
    each_row(threads, rows, n * n * d, [&](int64_t row) {
        mix_one(x + row * n * d, y + row * d, post + row * n, comb + row * n * n, n, d, out + row * n * d);
    });
}

// The same of bfloat16 streams
void ff_half_read_streams(const uint16_t* x, const float* pre, int64_t rows, int n, int64_t d, uint16_t* out, int threads) {
    each_row(threads, rows, n * d, [&](int64_t row) { read_one(x + row * n * d, pre + row * n, n, d, out + row * d); });
}
void ff_half_mix_streams(const uint16_t* x, const uint16_t* y, const float* post, const float* comb, int64_t rows, int n,
                         int64_t d, uint16_t* out, int threads) {
    each_row(threads, rows, n * n * d, [&](int64_t row) {
        mix_one(x + row * n * d, y + row * d, post + row * n, comb + row * n * n, n, d, out + row * n * d);
    });
}
}
