#include "blocks.h"

#include <algorithm>
#include <bit>
#include <cstring>


#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Kernel = void (*)(const Weight&, const uint8_t*, const void*, const Tile&, float*);

float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

// ---------------------------------------------------------------- plain

void plain(const Weight& w, const uint8_t* codes, const void* scales, const Tile& t, float* out) {
    const int8_t* x = reinterpret_cast<const int8_t*>(t.words.data());
    std::fill(out, out + t.rows * ROWS, 0.f);
    for (int64_t g = 0; g < w.groups(); g++)
        for (int m = 0; m < t.rows; m++)
            for (int r = 0; r < ROWS; r++) {
                int32_t sum = t.offsets[g * t.rows + m];
                for (int k = 0; k < GROUP; k++) {
                    const int64_t column = g * GROUP + k;
                    const int line_columns = w.bits == 4 ? 8 : 4, inside = k % line_columns;
                    const uint8_t byte = codes[(column / line_columns * ROWS + r) * 4 + inside % 4];
                    const int code = w.bits == 8 ? byte : inside < 4 ? byte & 15 : byte >> 4;
                    sum += code * x[(column / 4 * t.rows + m) * 4 + column % 4];
                }
                const float scale =
                    w.bits == 4 ? from_bfloat16(static_cast<const uint16_t*>(scales)[g / w.span * ROWS + r]) : 1.f;
                out[m * ROWS + r] += scale * t.scales[g * t.rows + m] * float(sum);
            }
    if (w.bits == 8)
        for (int i = 0; i < t.rows * ROWS; i++) out[i] *= static_cast<const float*>(scales)[i % ROWS];
}

#if defined(__x86_64__)

// ---------------------------------------------------------------- AVX2: eight rows at a time

#pragma GCC push_options
#pragma GCC target("avx2,fma")

template <int BITS> void avx2(const Weight& w, const uint8_t* codes, const void* scales, const Tile& t, float* out) {
    const __m256i nibble = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), flip = _mm256_set1_epi8(-128);
    const int lines = GROUP * BITS / 32, M = t.rows;
    for (int half = 0; half < 2; half++)
        for (int m = 0; m < M; m++) {
            const uint8_t* line = codes + 32 * half;
            const int32_t* x = t.words.data() + m;
            __m256 sum = _mm256_setzero_ps();
            for (int64_t g = 0; g < w.groups(); g++) {
                // the sum of two products of bytes fits 16 bits: 2 * 128 * 127 and 4 * 15 * 127
                __m256i dot = BITS == 4 ? _mm256_set1_epi32(t.offsets[g * M + m]) : _mm256_setzero_si256();
                for (int j = 0; j < lines; j++, line += 64) {
                    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
                    __m256i products;
                    if constexpr (BITS == 4) {
                        const __m256i low = _mm256_and_si256(v, nibble);
                        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
                        products = _mm256_add_epi16(_mm256_maddubs_epi16(low, _mm256_set1_epi32(x[0])),
                                                    _mm256_maddubs_epi16(high, _mm256_set1_epi32(x[M])));
                        x += 2 * M;
                    } else {  // signed by signed: the sign goes over to the activations
                        const __m256i code = _mm256_xor_si256(v, flip);
                        products = _mm256_maddubs_epi16(_mm256_abs_epi8(code),
                                                        _mm256_sign_epi8(_mm256_set1_epi32(x[0]), code));
                        x += M;
                    }
                    dot = _mm256_add_epi32(dot, _mm256_madd_epi16(products, ones));
                }
                __m256 factor = _mm256_set1_ps(t.scales[g * M + m]);
                if constexpr (BITS == 4) {
                    const uint16_t* s = static_cast<const uint16_t*>(scales) + g / w.span * ROWS + 8 * half;
                    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s)));
                    factor = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)), factor);
                }
                sum = _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(dot), sum);
            }
            if constexpr (BITS == 8)
                sum = _mm256_mul_ps(sum, _mm256_loadu_ps(static_cast<const float*>(scales) + 8 * half));
            _mm256_storeu_ps(out + m * ROWS + 8 * half, sum);
        }
}

#pragma GCC pop_options

// ---------------------------------------------------------------- AVX-512: a line of 16 rows against M words

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")

template <int BITS, int M>
void vnni_rows(const Weight& w, const uint8_t* line, const void* scales, const Tile& t, float* out) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const int32_t *x = t.words.data(), *offset = t.offsets.data();
    const float* x_scale = t.scales.data();
    const uint16_t* s = static_cast<const uint16_t*>(scales);
    __m512 sum[M], scale = _mm512_setzero_ps();
    for (int m = 0; m < M; m++) sum[m] = _mm512_setzero_ps();
    int64_t left = 0;  // groups until the next scale
    for (int64_t g = w.groups(); g > 0; g--) {
        __m512i dot[M];
        for (int m = 0; m < M; m++) dot[m] = _mm512_set1_epi32(offset[m]);
#pragma GCC unroll 8
        for (int j = 0; j < GROUP * BITS / 32; j++, line += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(line) + 4096, _MM_HINT_T0);
            const __m512i v = _mm512_loadu_si512(line);
            if constexpr (BITS == 4) {
                const __m512i low = _mm512_and_si512(v, nibble);
                const __m512i high = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
                for (int m = 0; m < M; m++) dot[m] = _mm512_dpbusd_epi32(dot[m], low, _mm512_set1_epi32(x[m]));
                for (int m = 0; m < M; m++) dot[m] = _mm512_dpbusd_epi32(dot[m], high, _mm512_set1_epi32(x[M + m]));
                x += 2 * M;
            } else {
                for (int m = 0; m < M; m++) dot[m] = _mm512_dpbusd_epi32(dot[m], v, _mm512_set1_epi32(x[m]));
                x += M;
            }
        }
        if (BITS == 4 && left-- == 0) {
            const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(s)));
            scale = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
            left = w.span - 1, s += ROWS;
        }
        for (int m = 0; m < M; m++) {
            __m512 factor = _mm512_set1_ps(x_scale[m]);
            if constexpr (BITS == 4) factor = _mm512_mul_ps(scale, factor);
            sum[m] = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(dot[m]), sum[m]);
        }
        offset += M, x_scale += M;
    }
    for (int m = 0; m < M; m++) {
        if constexpr (BITS == 8) sum[m] = _mm512_mul_ps(sum[m], _mm512_loadu_ps(scales));
        _mm512_storeu_ps(out + m * ROWS, sum[m]);
    }
}

template <int BITS> void vnni(const Weight& w, const uint8_t* codes, const void* scales, const Tile& t, float* out) {
    constexpr Kernel by_rows[TILE] = {vnni_rows<BITS, 1>, vnni_rows<BITS, 2>, vnni_rows<BITS, 3>, vnni_rows<BITS, 4>,
                                      vnni_rows<BITS, 5>, vnni_rows<BITS, 6>, vnni_rows<BITS, 7>, vnni_rows<BITS, 8>};
    by_rows[t.rows - 1](w, codes, scales, t, out);
}

#pragma GCC pop_options
#endif

int best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

int chosen_level = best_level();

Kernel kernel(int bits) {
#if defined(__x86_64__)
    if (chosen_level == 2) return bits == 4 ? vnni<4> : vnni<8>;
    if (chosen_level == 1) return bits == 4 ? avx2<4> : avx2<8>;
#endif
    return plain;
}

// Codes of 32 numbers, rounded to nearest; their sum, and the scale. Bits of magnitudes are ordered like the numbers.
void quantise_group(const float* x, int8_t* codes, float* scale, int32_t* sum) {
    int32_t top = 0, total = 0;
    for (int k = 0; k < GROUP; k++) top = std::max(top, std::bit_cast<int32_t>(x[k]) & 0x7fffffff);
    const float most = std::bit_cast<float>(top), inverse = most > 0 ? 127.f / most : 0.f;
    constexpr float MAGIC = 12582912.f;  // 1.5 * 2^23: adding it leaves the rounded number in the low bits
    for (int k = 0; k < GROUP; k++) {
        const int32_t q = std::bit_cast<int32_t>(x[k] * inverse + MAGIC) - std::bit_cast<int32_t>(MAGIC);
        codes[k] = int8_t(q);
        total += q;
    }
    *scale = most / 127.f;
    *sum = total;
}

}  // namespace

void Tile::quantise(const float* const* x, int m, int64_t columns, int64_t groups, int bits, bool fine) {
    rows = fine ? 2 * m : m;
    words.resize(groups * (GROUP / 4) * rows);
    offsets.resize(groups * rows);
    scales.resize(groups * rows);
    const int32_t unsign = bits == 4 ? -8 : -128;
    alignas(64) int8_t codes[GROUP];
    for (int row = 0; row < rows; row++)
        for (int64_t g = 0; g < groups; g++) {
            float part[GROUP] = {};
            const int64_t there = std::clamp(columns - g * GROUP, int64_t(0), int64_t(GROUP));
            std::copy_n(x[fine ? row / 2 : row] + g * GROUP, there, part);
            if (fine && row % 2) {
                for (int k = 0; k < GROUP; k++) {
                    const int32_t word = words[(g * (GROUP / 4) + k / 4) * rows + row - 1];
                    part[k] -= scales[g * rows + row - 1] * float(int8_t(uint32_t(word) >> (8 * (k % 4))));
                }
            }
            int32_t sum;
            quantise_group(part, codes, &scales[g * rows + row], &sum);
            offsets[g * rows + row] = unsign * sum;
            for (int j = 0; j < GROUP / 4; j++) std::memcpy(&words[(g * (GROUP / 4) + j) * rows + row], codes + 4 * j, 4);
        }
}

void block_product(const Weight& w, int64_t b, const Tile& tile, float* out) {
    kernel(w.bits)(w, w.block(b), w.block_scales(b), tile, out);
}

int use_level(int level) { return chosen_level = std::clamp(level, 0, best_level()); }
