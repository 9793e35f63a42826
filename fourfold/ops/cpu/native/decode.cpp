// Some layers of a model with compressed attention and hyper-connections, one new position of each sequence: the whole
// step in one call, for between small products the way back to the caller would take longer than they do.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "products.h"
#include "shared_kv.h"
#include "team.h"

namespace {

constexpr int64_t WORTH_A_PART = 1 << 15;  // products
constexpr int64_t EIGHT = 8, STRIPE = 32;  // rows of a weight: of one call, and that stay in the nearest cache
constexpr int PARTS_PER_THREAD = 4;

// The layout of these is that of the tables which the caller fills: see fourfold/ops/cpu/decode.py
struct Site {
    Array fn, base, scale, norm;
};
struct Pooling {
    Array kv, gate, bias, norm;
};
struct Layer {
    Site attention_site;
    Array q_a, q_a_norm, q_b, kv, kv_norm, o_a, o_b, sinks;
    Pooling pool, index_pool;
    Array index_q, index_weights;
    Site mlp_site;
    Array router, router_bias, router_table, gate_up, down, shared_gate, shared_up, shared_down;
    int64_t ratio, overlaps, shared_width;
    int64_t window_tail, pool_tail, index_tail;  // where its rows begin in a tail
    int64_t entries, keys;                       // and its slots in a page
};
struct Sizes {
    int64_t d, streams, heads, head, rope, q_rank, groups, o_rank, window, index_heads, index_head, topk;
    int64_t experts, per_token, expert_width, scoring, normed_shares, iterations, half;
};
struct Factors {
    float eps, stream_eps, scale, limit, share, rope, compress_rope;
};
struct Step {
    int64_t rows;
    const int64_t *positions, *tokens;
    const float* const* tails;  // of each sequence, before
    float* new_tails;
    int64_t tail_width;
    Array pages;
    int64_t page_stride, page_size;
    const int64_t* tables;
    int64_t table_width, threads, vectors;  // vectors: whether a matrix unit is left aside
};

struct Product {
    Array weight;
    int64_t rows, columns;
    const float* x;
    int64_t x_step;
    float* y;
    int64_t y_step;
};

// Independent products together
void multiply(const std::vector<Product>& all, int64_t tokens, int threads) {
    int64_t groups = 0, work = 0;
    for (const Product& p : all) groups += (p.rows + EIGHT - 1) / EIGHT, work += p.rows * p.columns * tokens;
    const int parts = int(std::clamp(work / WORTH_A_PART, int64_t(1), std::min<int64_t>(groups, threads * PARTS_PER_THREAD)));
    in_parts(threads, parts, [&](int part) {
        int64_t first = groups * part / parts, last = groups * (part + 1) / parts;
        for (const Product& p : all) {
            const int64_t here = (p.rows + EIGHT - 1) / EIGHT;
            if (first < here && last > 0)
                product_rows(p.weight, std::max<int64_t>(first, 0) * EIGHT, std::min(p.rows, last * EIGHT), p.columns, p.x,
                             tokens, p.x_step, p.y, p.y_step);
            first -= here, last -= here;
        }
    });
}

// The last pairs of x [width] turned by an angle, or back
void turn(float* x, int64_t width, int64_t rope, const float* cos, const float* sin, bool back = false) {
    float* pair = x + width - rope;
    for (int64_t i = 0; i < rope / 2; i++, pair += 2) {
        const float s = back ? -sin[i] : sin[i], first = pair[0], second = pair[1];
        pair[0] = first * cos[i] - second * s;
        pair[1] = first * s + second * cos[i];
    }
}

float score_of(float logit, int64_t scoring) {
    if (scoring == 0) return 1 / (1 + std::exp(-logit));
    return std::sqrt(logit > 20 ? logit : std::log1p(std::exp(logit)));
}

void write_row(Array to, const float* x, int64_t n) {
    if (!to.half) {
        std::copy_n(x, n, static_cast<float*>(const_cast<void*>(to.at)));
        return;
    }
    uint16_t* numbers = static_cast<uint16_t*>(const_cast<void*>(to.at));
    for (int64_t i = 0; i < n; i++) {
        float one = x[i];
        round_half(&one, 1);
        uint32_t bits;
        __builtin_memcpy(&bits, &one, 4);
        numbers[i] = uint16_t(bits >> 16);
    }
}

// Each channel of `rows` rows weighed by a softmax of its own. row(i): its values; its scores lie `apart` after them
template <class Row> void pool_rows(int64_t rows, int64_t apart, int64_t width, const Row& row, float* out) {
    std::vector<float> top(width, -INFINITY), total(width, 0.f);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < width; c++) top[c] = std::max(top[c], row(i)[apart + c]);
    std::fill(out, out + width, 0.f);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < width; c++) {
            const float share = std::exp(row(i)[apart + c] - top[c]);
            total[c] += share, out[c] += share * row(i)[c];
        }
    for (int64_t c = 0; c < width; c++) out[c] /= total[c];
}

struct Decoder {
    const Sizes& z;
    const Factors& f;
    const Step& step;
    int64_t T;
    int threads;
    std::vector<float> cos[2], sin[2];  // [T, rope / 2]: of a window alone, and where there are entries
    const float* frequencies[2];
    std::vector<float> streams, other, pre, post, comb, mixed, read, x, y, parameters;
    std::vector<float> latent, kv, q, o, grouped, pooled, index_pooled, index_q, index_weights, one;
    std::vector<float> logits, shares, gate, up, sums;
    std::vector<int64_t> seen, chosen, experts;
    std::vector<SharedKeys> keys;

    Decoder(const Sizes& sizes, const Factors& factors, const Step& step, const float* plain, const float* compress)
        : z(sizes), f(factors), step(step), T(step.rows), threads(int(step.threads)), frequencies{plain, compress} {
        const int64_t half = z.rope / 2;
        for (int kind = 0; kind < 2; kind++) {
            cos[kind].resize(T * half), sin[kind].resize(T * half);
            for (int64_t t = 0; t < T; t++) angles(kind, step.positions[t], &cos[kind][t * half], &sin[kind][t * half]);
        }
    }

    void angles(int kind, int64_t position, float* c, float* s) const {
        const float factor = kind ? f.compress_rope : f.rope;
        for (int64_t i = 0; i < z.rope / 2; i++) {
            const float angle = float(position) * frequencies[kind][i];
            c[i] = std::cos(angle) * factor, s[i] = std::sin(angle) * factor;
        }
    }

    // What the model's own dtype would hold
    void fit(std::vector<float>& v) const {
        if (z.half) round_half(v.data(), int64_t(v.size()));
    }

    void norm(const float* from, Array weight, float* to, int64_t rows, int64_t width) {
        if (weight) parameters.resize(width), widen(weight, width, parameters.data());
        ff_rms_norm(from, nullptr, weight ? parameters.data() : nullptr, to, rows, width, f.eps);
    }

    const float* table(int kind, int64_t t, bool sine) const { return &(sine ? sin : cos)[kind][t * (z.rope / 2)]; }

    void open(const Site& site) {
        const int64_t n = z.streams, outputs = n * (n + 2), width = n * z.d;
        mixed.resize(T * outputs), pre.resize(T * n), post.resize(T * n), comb.resize(T * n * n);
        read.resize(T * z.d), x.resize(T * z.d);
        multiply({{site.fn, outputs, width, streams.data(), width, mixed.data(), outputs}}, T, threads);
        parameters.resize(outputs + 3);
        widen(site.base, outputs, parameters.data()), widen(site.scale, 3, parameters.data() + outputs);
        ff_hyper_maps(streams.data(), nullptr, parameters.data(), parameters.data() + outputs, mixed.data(), T, int(n), width,
                      int(z.iterations), f.stream_eps, f.eps, pre.data(), post.data(), comb.data(), threads);
        ff_read_streams(streams.data(), pre.data(), T, int(n), z.d, read.data(), 1);
        fit(read);
        norm(read.data(), site.norm, x.data(), T, z.d);
        fit(x);
    }

    void close() {
        other.resize(streams.size());
        ff_mix_streams(streams.data(), y.data(), post.data(), comb.data(), T, int(z.streams), z.d, other.data(), threads);
        fit(other);
        streams.swap(other);
    }

    // Where entry number `entry` of sequence t lies, in the slot that begins at `start` of a page
    Array place(int64_t t, int64_t start, int64_t entry, int64_t per_page, int64_t width) const {
        const int64_t page = step.tables[t * step.table_width + entry / per_page];
        return step.pages.from(page * step.page_stride + start + entry % per_page * width);
    }

    // The tail moves on by the new rows [T, 2 out] of values and scores; a group that is complete becomes an entry
    void pool(const Layer& layer, const Pooling& by, int64_t tail, int64_t slot, int64_t width, float* rows, bool rounded) {
        const int64_t out = width * (layer.overlaps ? 2 : 1), ratio = layer.ratio, row = 2 * out;
        const int64_t pending = (layer.overlaps ? 2 : 1) * ratio - 1, per_page = step.page_size / ratio;
        for (int64_t t = 0; t < T; t++) {
            const int64_t position = step.positions[t];
            float* raw = rows + t * row;
            if (by.bias) {
                parameters.resize(out), widen(by.bias.from(position % ratio * out), out, parameters.data());
                for (int64_t c = 0; c < out; c++) raw[out + c] += parameters[c];
            }
            const float* before = step.tails[t] + tail;
            float* after = step.new_tails + t * step.tail_width + tail;
            if (pending) {
                std::copy_n(before + row, (pending - 1) * row, after);
                std::copy_n(raw, row, after + (pending - 1) * row);
            }
            if ((position + 1) % ratio) continue;
            const int64_t number = position / ratio, older = layer.overlaps && number ? ratio : 0, first = pending + 1 - ratio;
            const auto at = [&](int64_t i) { return i < pending ? before + i * row : raw; };
            one.resize(2 * width + z.rope);
            pool_rows(older + ratio, out, width, [&](int64_t i) {
                return i < older ? at(i) : at(first + i - older) + (layer.overlaps ? width : 0);
            }, one.data());
            float *entry = one.data() + width, *c = entry + width, *s = c + z.rope / 2;
            norm(one.data(), by.norm, entry, 1, width);
            angles(1, number * ratio, c, s);
            turn(entry, width, z.rope, c, s);
            if (rounded && z.half) round_half(entry, width);
            write_row(place(t, slot, number, per_page, width), entry, width);
        }
    }

    // Numbers of the entries that each query attends to; where those are all, none are named
    void select(const Layer& layer) {
        const int64_t per_page = step.page_size / layer.ratio;
        seen.resize(T), chosen.clear();
        bool all = true;
        for (int64_t t = 0; t < T; t++) {
            seen[t] = (step.positions[t] + 1) / layer.ratio;
            all = all && seen[t] <= z.topk;
        }
        if (all || !layer.index_q) return;
        const float factor = 1 / std::sqrt(float(z.index_heads * z.index_head));
        for (float& weight : index_weights) weight *= factor;
        chosen.resize(T * z.topk);
        ff_select_positions(step.pages.from(layer.keys).at, nullptr, int(step.pages.half), step.tables, step.table_width,
                            step.page_stride, 0, per_page, 1, 0, step.positions, layer.ratio, -INFINITY, index_q.data(),
                            index_weights.data(), nullptr, nullptr, T, 1, z.index_heads, z.index_head, z.topk, chosen.data(),
                            int(step.vectors), threads);
        for (int64_t t = 0; t < T; t++) seen[t] = std::min(seen[t], z.topk);
    }

    void attention(const Layer& layer) {
        const int64_t width = z.heads * z.head, kept = z.window - 1, kind = layer.ratio ? 1 : 0;
        const int64_t out = z.head * (layer.overlaps ? 2 : 1), index_out = 2 * z.index_head, index = z.index_heads * z.index_head;
        latent.resize(T * z.q_rank), kv.resize(T * z.head), q.resize(T * width), o.resize(T * width);
        std::vector<Product> first = {
            {layer.q_a, z.q_rank, z.d, x.data(), z.d, latent.data(), z.q_rank},
            {layer.kv, z.head, z.d, x.data(), z.d, kv.data(), z.head},
        };
        const auto project = [&](const Pooling& by, int64_t columns, std::vector<float>& to) {
            to.assign(T * 2 * columns, 0.f);
            first.push_back({by.kv, columns, z.d, x.data(), z.d, to.data(), 2 * columns});
            if (by.gate) first.push_back({by.gate, columns, z.d, x.data(), z.d, to.data() + columns, 2 * columns});
        };
        if (layer.ratio) project(layer.pool, out, pooled);
        if (layer.index_q) {
            project(layer.index_pool, index_out, index_pooled);
            index_weights.resize(T * z.index_heads), index_q.resize(T * index);
            first.push_back({layer.index_weights, z.index_heads, z.d, x.data(), z.d, index_weights.data(), z.index_heads});
        }
        multiply(first, T, threads);

        fit(latent), norm(latent.data(), layer.q_a_norm, latent.data(), T, z.q_rank), fit(latent);
        std::vector<Product> second = {{layer.q_b, width, z.q_rank, latent.data(), z.q_rank, q.data(), width}};
        if (layer.index_q) second.push_back({layer.index_q, index, z.q_rank, latent.data(), z.q_rank, index_q.data(), index});
        multiply(second, T, threads);

        fit(q), norm(q.data(), {}, q.data(), T * z.heads, z.head), fit(q);
        fit(kv), norm(kv.data(), layer.kv_norm, kv.data(), T, z.head), fit(kv);
        for (int64_t t = 0; t < T; t++) {
            const float *c = table(int(kind), t, false), *s = table(int(kind), t, true);
            for (int64_t h = 0; h < z.heads; h++) turn(&q[t * width + h * z.head], z.head, z.rope, c, s);
            turn(&kv[t * z.head], z.head, z.rope, c, s);
            if (layer.index_q)
                for (int64_t h = 0; h < z.index_heads; h++) turn(&index_q[t * index + h * z.index_head], z.index_head, z.rope, c, s);
        }
        fit(q), fit(kv);

        if (layer.ratio) pool(layer, layer.pool, layer.pool_tail, layer.entries, z.head, pooled.data(), true);
        if (layer.index_q) pool(layer, layer.index_pool, layer.index_tail, layer.keys, z.index_head, index_pooled.data(), false);
        if (layer.ratio) select(layer);
        keys.resize(T);
        for (int64_t t = 0; t < T; t++) {
            const float* before = step.tails[t] + layer.window_tail;
            const int64_t recent = std::min(step.positions[t], kept);
            keys[t] = {before + (kept - recent) * z.head, recent, &kv[t * z.head], step.pages.from(layer.entries),
                       step.tables + t * step.table_width, step.page_stride, layer.ratio ? step.page_size / layer.ratio : 1,
                       layer.ratio && chosen.size() ? &chosen[t * z.topk] : nullptr, layer.ratio ? seen[t] : 0};
            if (!kept) continue;
            float* after = step.new_tails + t * step.tail_width + layer.window_tail;
            std::copy_n(before + z.head, (kept - 1) * z.head, after);
            std::copy_n(&kv[t * z.head], z.head, after + (kept - 1) * z.head);
        }
        parameters.resize(z.heads), widen(layer.sinks, z.heads, parameters.data());
        attend_shared(keys.data(), T, q.data(), parameters.data(), z.heads, z.head, f.scale, o.data(), threads);
        fit(o);
        for (int64_t t = 0; t < T; t++)
            for (int64_t h = 0; h < z.heads; h++)
                turn(&o[t * width + h * z.head], z.head, z.rope, table(int(kind), t, false), table(int(kind), t, true), true);
        fit(o);

        const int64_t each = width / z.groups, all = z.groups * z.o_rank;
        grouped.resize(T * all), y.resize(T * z.d);
        std::vector<Product> third;
        for (int64_t g = 0; g < z.groups; g++)
            third.push_back({layer.o_a.from(g * z.o_rank * each), z.o_rank, each, &o[g * each], width, &grouped[g * z.o_rank], all});
        multiply(third, T, threads), fit(grouped);
        multiply({{layer.o_b, z.d, all, grouped.data(), all, y.data(), z.d}}, T, threads), fit(y);
    }

    // Chooses and weighs the experts of each token
    void route(const Layer& layer) {
        const int64_t E = z.experts, K = z.per_token;
        logits.resize(T * E), shares.resize(T * K), experts.resize(T * K);
        multiply({{layer.router, E, z.d, x.data(), z.d, logits.data(), E}}, T, threads);
        parameters.assign(E, 0.f);
        if (layer.router_bias) widen(layer.router_bias, E, parameters.data());
        std::vector<int64_t> order(E);
        for (int64_t t = 0; t < T; t++) {
            float* score = &logits[t * E];
            if (z.scoring == 2) {
                const float top = *std::max_element(score, score + E);
                float total = 0;
                for (int64_t e = 0; e < E; e++) total += score[e] = std::exp(score[e] - top);
                for (int64_t e = 0; e < E; e++) score[e] /= total;
            } else {
                for (int64_t e = 0; e < E; e++) score[e] = score_of(score[e], z.scoring);
            }
            int64_t* to = &experts[t * K];
            if (layer.router_table) {
                std::copy_n(static_cast<const int64_t*>(layer.router_table.at) + step.tokens[t] * K, K, to);
            } else {
                std::iota(order.begin(), order.end(), 0);
                std::partial_sort_copy(order.begin(), order.end(), to, to + K, [&](int64_t a, int64_t b) {
                    const float first = score[a] + parameters[a], second = score[b] + parameters[b];
                    return first > second || (first == second && a < b);
                });
            }
            float total = 1e-20f;
            for (int64_t k = 0; k < K; k++) total += score[to[k]];
            for (int64_t k = 0; k < K; k++) shares[t * K + k] = score[to[k]] / (z.normed_shares ? total : 1.f) * f.share;
        }
    }

    struct Use {  // of one expert by one token
        int64_t expert, token, slot;
    };

    // to[token] = the sum over `uses`, which are sorted by expert; width: of an expert
    template <class Gate, class Up, class Down, class Share>
    void expert_sum(const std::vector<Use>& uses, int64_t width, const Gate& gate_of, const Up& up_of, const Down& down_of,
                    const Share& share_of, float* to) {
        const int64_t n = int64_t(uses.size()), stripes = (width + STRIPE - 1) / STRIPE, work = n * width * z.d;
        gate.resize(n * width), up.resize(n * width);
        const auto parts_of = [&](int64_t most, int64_t products) {
            return int(std::clamp(products / WORTH_A_PART, int64_t(1), std::min<int64_t>(most, threads * PARTS_PER_THREAD)));
        };
        std::vector<int64_t> begins;  // where the uses of each expert begin
        for (int64_t i = 0; i < n; i++)
            if (!i || uses[i].expert != uses[i - 1].expert) begins.push_back(i);
        begins.push_back(n);
        const int64_t units = int64_t(begins.size() - 1) * stripes;
        int parts = parts_of(units, 2 * work);
        in_parts(threads, parts, [&](int part) {
            for (int64_t unit = units * part / parts; unit < units * (part + 1) / parts; unit++) {
                const int64_t group = unit / stripes, first = unit % stripes * STRIPE, last = std::min(width, first + STRIPE);
                for (int64_t i = begins[group]; i < begins[group + 1]; i++) {
                    const float* from = &x[uses[i].token * z.d];
                    float *g = &gate[i * width], *u = &up[i * width];
                    product_rows(gate_of(uses[i]), first, last, z.d, from, 1, 0, g, 0);
                    product_rows(up_of(uses[i]), first, last, z.d, from, 1, 0, u, 0);
                    const float share = share_of(uses[i]);
                    for (int64_t c = first; c < last; c++) {
                        float a = g[c], b = u[c];
                        if (f.limit > 0) a = std::min(a, f.limit), b = std::clamp(b, -f.limit, f.limit);
                        g[c] = a / (1 + std::exp(-a)) * b * share;
                    }
                }
            }
        });
        const int64_t ranges = (z.d + STRIPE - 1) / STRIPE;
        parts = parts_of(ranges, work);
        in_parts(threads, parts, [&](int part) {
            for (int64_t range = ranges * part / parts; range < ranges * (part + 1) / parts; range++) {
                const int64_t first = range * STRIPE, last = std::min(z.d, first + STRIPE);
                float some[STRIPE];
                for (int64_t t = 0; t < T; t++) std::fill(to + t * z.d + first, to + t * z.d + last, 0.f);
                for (int64_t i = 0; i < n; i++) {
                    product_rows(down_of(uses[i]).from(first * width), 0, last - first, width, &gate[i * width], 1, 0, some, 0);
                    for (int64_t c = first; c < last; c++) to[uses[i].token * z.d + c] += some[c - first];
                }
            }
        });
    }

    void feed_forward(const Layer& layer) {
        y.assign(T * z.d, 0.f);
        std::vector<Use> uses;
        if (layer.router) {
            route(layer);
            const int64_t width = z.expert_width, size = width * z.d;
            for (int64_t i = 0; i < T * z.per_token; i++) uses.push_back({experts[i], i / z.per_token, i});
            std::stable_sort(uses.begin(), uses.end(), [](const Use& a, const Use& b) { return a.expert < b.expert; });
            expert_sum(uses, width, [&](const Use& it) { return layer.gate_up.from(2 * it.expert * size); },
                       [&](const Use& it) { return layer.gate_up.from((2 * it.expert + 1) * size); },
                       [&](const Use& it) { return layer.down.from(it.expert * size); },
                       [&](const Use& it) { return shares[it.slot]; }, y.data());
            fit(y);
        }
        if (!layer.shared_gate) return;
        uses.clear();
        for (int64_t t = 0; t < T; t++) uses.push_back({0, t, t});
        sums.resize(T * z.d);
        expert_sum(uses, layer.shared_width, [&](const Use&) { return layer.shared_gate; },
                   [&](const Use&) { return layer.shared_up; }, [&](const Use&) { return layer.shared_down; },
                   [](const Use&) { return 1.f; }, sums.data());
        fit(sums);
        for (size_t i = 0; i < sums.size(); i++) y[i] += sums[i];
        fit(y);
    }
};

}  // namespace

// The streams [rows, n, d] go through `count` layers. frequencies: float [2, rope / 2], of the positions and of those of
// layers with entries. Fills what these layers keep in new_tails, and the entries that are complete in their pages.
extern "C" void ff_decode_layers(const void* layers, int64_t count, const void* sizes, const void* factors, const void* step,
                                 const float* frequencies, float* streams) {
    const Sizes& z = *static_cast<const Sizes*>(sizes);
    Decoder decoder(z, *static_cast<const Factors*>(factors), *static_cast<const Step*>(step), frequencies,
                    frequencies + z.rope / 2);
    const int64_t n = decoder.T * z.streams * z.d;
    decoder.streams.assign(streams, streams + n);
    for (int64_t i = 0; i < count; i++) {
        const Layer& layer = static_cast<const Layer*>(layers)[i];
        decoder.open(layer.attention_site), decoder.attention(layer), decoder.close();
        decoder.open(layer.mlp_site), decoder.feed_forward(layer), decoder.close();
    }
    std::copy_n(decoder.streams.data(), n, streams);
}
