// Kernels of other files that a decoding step is made of; what they compute is said where they are.
#pragma once

#include <cstdint>

extern "C" {
void ff_hyper_maps(const float* x, const float* fn, const float* base, const float* scale, const float* mixed,
                   int64_t rows, int n, int64_t width, int iterations, float eps, float norm_eps, float* pre,
                   float* post, float* comb, int threads);
void ff_read_streams(const float* x, const float* pre, int64_t rows, int n, int64_t d, float* out, int threads);
void ff_mix_streams(const float* x, const float* y, const float* post, const float* comb, int64_t rows, int n, int64_t d,
                    float* out, int threads);
void ff_rms_norm(const float* x, float* residual, const float* weight, float* out, int64_t rows, int64_t d, float eps);
void ff_select_positions(const void* keys, const void* summaries, int format, const int64_t* pages, int64_t n_pages,
                         int64_t page_stride, int64_t summary_stride, int64_t page_size, int64_t block, int64_t blocks,
                         const int64_t* past, int64_t ratio, float floor, const float* q, const float* weights,
                         const float* block_q, const float* block_weights, int64_t batch, int64_t queries,
                         int64_t heads, int64_t width, int64_t k, int64_t* out, int vectors, int threads);
}
