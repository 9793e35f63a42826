// The k best of many scores that are offered a chunk at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "matrix.h"

#ifdef __SSE__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t CHUNK = 64;  // scores that are offered at a time

// A score and its position as one number: the greater score is the greater number, of equal ones the later position.
typedef uint64_t Scored;

INLINE Scored scored(float score, uint32_t position) {
    score += 0.f;  // there is one zero
    uint32_t bits;
    std::memcpy(&bits, &score, 4);
    bits ^= uint32_t(int32_t(bits) >> 31) | 0x80000000u;
    return Scored(bits) << 32 | position;
}
INLINE float score_of(Scored it) {
    uint32_t bits = it >> 32;
    bits ^= bits >> 31 ? 0x80000000u : ~0u;
    float score;
    std::memcpy(&score, &bits, 4);
    return score;
}

struct Plainly {
    // Bit i: x[i] >= bar, of four numbers
    static unsigned not_below(const float* x, float bar) {
#ifdef __SSE__
        return _mm_movemask_ps(_mm_cmpge_ps(_mm_loadu_ps(x), _mm_set1_ps(bar)));
#else
        return (x[0] >= bar) | (x[1] >= bar) << 1 | (x[2] >= bar) << 2 | (x[3] >= bar) << 3;
#endif
    }
    // Writes those of n <= CHUNK scores that are not below the bar; how many. Scores up to a multiple of four are read.
    static int64_t take(const float* scores, const uint32_t* positions, int64_t n, float bar, Scored* to) {
        uint64_t some = 0;  // bit i: scores[i] counts
        for (int64_t i = 0; i < n; i += 4) some |= uint64_t(not_below(scores + i, bar)) << i;
        if (n < CHUNK) some &= (uint64_t(1) << n) - 1;
        Scored* end = to;
        for (; some; some &= some - 1) {
            const int64_t i = __builtin_ctzll(some);
            *end++ = scored(scores[i], positions[i]);
        }
        return end - to;
    }
    // Brings the k greatest of n to the front
    static void part(Scored* all, int64_t n, int64_t k, Scored*) {
        std::nth_element(all, all + k, all + n, std::greater<Scored>());
    }
};

#ifdef HAS_MATRIX
// The same with the vectors of a processor that has a matrix unit
struct ByVectors {
    MATRIX static int64_t take(const float* scores, const uint32_t* positions, int64_t n, float bar, Scored* to) {
        Scored* end = to;
        for (int64_t i = 0; i < n; i += LANES) {
            const __mmask16 there = n - i >= LANES ? 0xFFFF : (1 << (n - i)) - 1;
            const __m512 x = _mm512_maskz_loadu_ps(there, scores + i);
            const __mmask16 some = _mm512_mask_cmp_ps_mask(there, x, _mm512_set1_ps(bar), _CMP_GE_OQ);
            if (!some) continue;
            const __m512i at = _mm512_maskz_loadu_epi32(there, positions + i);
            __m512i bits = _mm512_castps_si512(_mm512_add_ps(x, _mm512_setzero_ps()));
            bits = _mm512_xor_si512(bits, _mm512_or_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(1 << 31)));
            end += store_chosen(end, some & 0xFF, joined(_mm512_castsi512_si256(bits), _mm512_castsi512_si256(at)));
            const __m256i high = _mm512_extracti64x4_epi64(bits, 1), high_at = _mm512_extracti64x4_epi64(at, 1);
            end += store_chosen(end, some >> 8, joined(high, high_at));
        }
        return end - to;
    }
    // Quickselect; what is left in each half keeps its order
    MATRIX static void part(Scored* all, int64_t n, int64_t k, Scored* spare) {
        int64_t from = 0, until = n;  // the k-th lies among these
        while (until - from > 32) {
            const Scored a = all[from], b = all[(from + until) / 2], c = all[until - 1];
            const Scored pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));  // never the greatest
            const __m512i pivots = _mm512_set1_epi64(pivot);
            int64_t front = from, less = 0;
            for (int64_t i = from; i < until; i += 8) {
                const __mmask8 there = until - i >= 8 ? 0xFF : (1 << (until - i)) - 1;
                const __m512i some = _mm512_maskz_loadu_epi64(there, all + i);
                const __mmask8 greater = _mm512_mask_cmpgt_epu64_mask(there, some, pivots);
                less += store_chosen(spare + less, there & ~greater, some);
                front += store_chosen(all + front, greater, some);
            }
            std::memcpy(all + front, spare, less * sizeof(Scored));
            (front >= k ? until : from) = front;
        }
        if (until > k) Plainly::part(all + from, until - from, k - from, nullptr);
    }

private:
    MATRIX static __m512i joined(__m256i scores, __m256i positions) {
        return _mm512_or_si512(_mm512_slli_epi64(_mm512_cvtepu32_epi64(scores), 32), _mm512_cvtepu32_epi64(positions));
    }
    MATRIX static int64_t store_chosen(Scored* to, __mmask8 chosen, __m512i from) {
        const int64_t count = __builtin_popcount(chosen);
        _mm512_mask_storeu_epi64(to, (1 << count) - 1, _mm512_maskz_compress_epi64(chosen, from));
        return count;
    }
};
#endif

// newest_first: no chunk has a position behind those offered before it, so that a score equal to the least one kept is
// none of the best. There may be many: keys of no consequence score zero.
template <class How> class Best {
    int64_t k, count = 0;
    bool newest_first;
    float bar = -INFINITY;
    std::vector<Scored> kept, spare;

public:
    Best(int64_t k, bool newest_first) : k(k), newest_first(newest_first), kept(2 * k + CHUNK), spare(2 * k + CHUNK) {}

    // What is less is not among them
    float least() const { return bar; }
    // n <= CHUNK scores and their positions; scores up to a multiple of four are read
    void offer(const float* scores, const uint32_t* positions, int64_t n) {
        count += How::take(scores, positions, n, bar, kept.data() + count);
        if (count >= 2 * k) trim();
    }
    void add(Best& other) {
        other.trim();
        trim();
        std::copy(other.kept.begin(), other.kept.begin() + other.count, kept.begin() + count);
        count += other.count;
    }
    // The positions of the k best, in any order
    void list(std::vector<int64_t>& positions) {
        trim();
        positions.clear();
        for (int64_t i = 0; i < count; i++) positions.push_back(uint32_t(kept[i]));
    }

private:
    void trim() {
        if (count <= k) return;
        How::part(kept.data(), count, k, spare.data());
        count = k;
        if (k > 0) bar = score_of(*std::min_element(kept.begin(), kept.begin() + k));
        if (newest_first) bar = std::nextafter(bar, INFINITY);
    }
};

}  // namespace
