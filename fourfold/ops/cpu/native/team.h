// A team of threads that survives a busy neighbour.
//
// Work is cut into parts that whoever is awake takes one after the other; the caller takes parts too, and waits only
// for parts that were taken. A worker whose core is busy elsewhere, or that a fork has left behind, delays nothing.
// Idle workers spin for a bounded time, so that the kernels of one token find them awake, and then sleep.
#pragma once

void run_parts(int threads, int parts, void (*body)(void*, int), void* context);

// Calls f(part) for part = 0 .. parts - 1, on up to `threads` threads.
template <class F> void in_parts(int threads, int parts, F&& f) {
    run_parts(threads, parts, [](void* context, int part) { (*static_cast<F*>(context))(part); }, &f);
}
