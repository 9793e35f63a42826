// Softmax attention of one query over keys that are values too, wherever they lie.
#pragma once

#include <cstdint>

#include "products.h"

// The keys of one sequence: rows of a tail that end with the newest, the query's own, and entries in pages.
struct SharedKeys {
    const float* tail;  // the first of `recent` rows
    int64_t recent;
    const float* own;
    Array pages;                 // where the first entry of page 0 lies
    const int64_t* table;        // the pages of this sequence
    int64_t page_stride, per_page;  // in numbers; entries
    const int64_t* chosen;       // numbers of the entries, or null: 0 .. entries - 1
    int64_t entries;

    int64_t count() const { return recent + 1 + entries; }
};

// q: float [batch, heads, width]; sinks: float [heads]; out: float [batch, heads, width]
void attend_shared(const SharedKeys* keys, int64_t batch, const float* q, const float* sinks, int64_t heads,
                   int64_t width, float scale, float* out, int threads);
