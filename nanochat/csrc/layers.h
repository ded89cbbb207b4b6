// What a few tokens (rows) ask of a norm, a linear layer, a head, an attention, an MLP and a Mamba-2 mixer. The same
// functions in PyTorch, for whatever does not come here, are in matryoshka.py, mamba_block.py and loss_eval.py.
#pragma once
#include "linear.h"

namespace {

// --- attention -------------------------------------------------------------------------------------------------------

// RoPE, then RMSNorm over the head, in place on p (hd); the result is multiplied by `scale`.
void place(float* p, const float* cos, const float* sin, int64_t hd, float eps, float scale) {
    const int64_t half = hd / 2;
    float square = 0;
    for (int64_t i = 0; i < half; i++) {
        const float a = p[i], b = p[i + half];
        p[i] = a * cos[i] + b * sin[i];
        p[i + half] = b * cos[i] - a * sin[i];
        square += a * a + b * b;        // rotations keep lengths
    }
    scale /= std::sqrt(square / hd + eps);
    for (int64_t i = 0; i < hd; i++) p[i] *= scale;
}

// y (hd) = softmax(q K^T) V over the positions 0..end-1 that have query head h (heads null: all have it).
template <class T>
void attend(const float* q, const T* k, const T* v, const int16_t* heads, int64_t h, int64_t end, int64_t hd, float* y) {
    float* p = scratch<float>(0, padded(end));
    float top = -INFINITY;
    for (int64_t s = 0; s < end; s++) {
        p[s] = heads && heads[s] <= h ? -INFINITY : dot(hd, q, k + s * hd);
        top = std::max(top, p[s]);
    }
    map(end, p, p, [&](vec x, int64_t) { return exp(x - top); });
    float total = 0;
    for (int64_t s = 0; s < end; s++) {
        if (heads && heads[s] <= h) p[s] = 0;
        total += p[s];
    }
    std::fill(y, y + hd, 0.0f);
    int64_t s = 0;
    for (; s + 4 <= end; s += 4)
        map(hd, y, y, [&](vec acc, int64_t i) {
            auto value = [&](int64_t t) {
                const T* at = v + t * hd + i;
                return i + LANES <= hd ? load(at) : load_part(at, hd - i);
            };
            return acc + p[s] * value(s) + p[s + 1] * value(s + 1) + p[s + 2] * value(s + 2) + p[s + 3] * value(s + 3);
        });
    for (; s < end; s++)
        for (int64_t i = 0; i < hd; i++) y[i] += p[s] * widen(v[s * hd + i]);
    for (int64_t i = 0; i < hd; i++) y[i] /= total;
}

// Where tokens stand in the cache: given one by one, or, rows null, `tokens` in each row from position `start` on.
struct Places {
    const int64_t *rows, *positions;
    int64_t tokens, start;
    int64_t row(int64_t r) const { return rows ? rows[r] : r / tokens; }
    int64_t position(int64_t r) const { return rows ? positions[r] : start + r % tokens; }
};

// ids: null, or value is a table in which the embedding of input row r is row ids[r].
template <class P, class T = typename P::Stored>
void attention(const T* x, T* out, const T* wq, const T* wk, const T* wv, const T* wo, const T* gate, const T* value,
               const int64_t* ids, const float* cos, const float* sin, T* keys, T* values, const int16_t* heads,
               const int64_t* rows, const int64_t* positions, int64_t n, int64_t d, int64_t x_stride, int64_t w_stride,
               int64_t hd, int64_t group, int64_t gate_in, int64_t value_stride, int64_t rope_rows, int64_t row_stride,
               int64_t head_stride, int64_t length, int64_t write_only, int64_t tokens, int64_t start, float d_ref,
               float eps) {
    const Places places{rows, positions, tokens, start};
    const int64_t n_head = d / hd, n_kv = (n_head + group - 1) / group, d_kv = n_kv * hd;
    const auto* u = inputs<P>(1, x, x_stride, n, d, d_ref, eps);
    auto* y = scratch<typename P::Input>(2, n * padded(d));
    float *q = scratch<float>(3, n * d), *k = scratch<float>(4, n * d_kv), *v = scratch<float>(5, n * d_kv);
    Phase project, write, read, back;
#pragma omp parallel
    {
        int64_t pieces = multiply<P>(project, {wk, d_kv, d, w_stride}, u, n,
                                     [&](int64_t r, int64_t o, float s) { k[r * d_kv + o] = s; });
        pieces += multiply<P>(project, {wv, d_kv, d, w_stride}, u, n,
                              [&](int64_t r, int64_t o, float s) { v[r * d_kv + o] = s; });
        if (!write_only)
            pieces += multiply<P>(project, {wq, d, d, w_stride}, u, n,
                                  [&](int64_t r, int64_t o, float s) { q[r * d + o] = s; });
        project.wait(pieces);
        write.run(n * n_kv, [&](int64_t i) {
            const int64_t r = i / n_kv, j = i % n_kv, angle = r % rope_rows * (hd / 2);
            const int64_t position = places.position(r);
            const int64_t at = places.row(r) * row_stride + j * head_stride + position * hd;
            if (position < 0) return;
            float *kj = k + r * d_kv + j * hd, *vj = v + r * d_kv + j * hd;
            place(kj, cos + angle, sin + angle, hd, eps, 1);
            if (gate) {
                float s = 0;
                for (int64_t i = 0; i < gate_in; i++) s += widen(gate[j * gate_in + i]) * widen(u[r * padded(d) + i]);
                const float g = 2 / (1 + std::exp(-s * std::sqrt(std::min(1.0f, d / d_ref))));
                const T* its = value + (ids ? ids[r] : r) * value_stride + j * hd;
                for (int64_t i = 0; i < hd; i++) vj[i] += g * widen(its[i]);
            }
            for (int64_t i = 0; i < hd; i++) put(keys + at + i, kj[i]), put(values + at + i, vj[i]);
        });
        if (!write_only) {
            write.wait(n * n_kv);
            read.run(n * n_head, [&](int64_t i) {
                const int64_t r = i / n_head, h = i % n_head, angle = r % rope_rows * (hd / 2);
                const int64_t row = places.row(r), position = places.position(r);
                const int64_t at = row * row_stride + h / group * head_stride;
                float *qh = q + r * d + h * hd, *yh = scratch<float>(6, hd);
                std::fill(yh, yh + hd, 0.0f);
                if (position >= 0) {
                    place(qh, cos + angle, sin + angle, hd, eps, 1 / std::sqrt(float(hd)));
                    const int16_t* have = heads ? heads + row * length : nullptr;
                    attend(qh, keys + at, values + at, have, h, position + 1, hd, yh);
                }
                for (int64_t i = 0; i < hd; i++) put_input<P>(y + r * padded(d) + h * hd + i, yh[i]);
            });
            read.wait(n * n_head);
            multiply<P>(back, {wo, d, d, w_stride}, y, n,
                        [&](int64_t r, int64_t o, float s) { put(out + r * d + o, s); });
        }
    }
}

// --- the other layers ------------------------------------------------------------------------------------------------

template <class P, class T = typename P::Stored>
void norm(const T* x, T* out, int64_t n, int64_t d, float d_ref, float eps) {
    for (int64_t r = 0; r < n; r++) {
        const float scale = 1 / std::sqrt(dot(d, x + r * d, x + r * d) / d_ref + eps);
        for (int64_t i = 0; i < d; i++) put(out + r * d + i, widen(x[r * d + i]) * scale);
    }
}

template <class P, class T = typename P::Stored>
void linear(const T* x, const T* w, T* out, int64_t n, int64_t k, int64_t rows, int64_t x_stride, int64_t w_stride) {
    const auto* u = inputs<P>(1, x, x_stride, n, k, 0, 0);
    Phase phase;
#pragma omp parallel
    multiply<P>(phase, {w, rows, k, w_stride}, u, n, [&](int64_t r, int64_t o, float s) { put(out + r * rows + o, s); });
}

// The capped logits (n, rows), fp32, of a head w (rows, k): cap * tanh(x w^T / cap).
template <class P, class T = typename P::Stored>
void head(const T* x, const T* w, float* out, int64_t n, int64_t k, int64_t rows, int64_t x_stride, int64_t w_stride,
          float cap) {
    const auto* u = inputs<P>(1, x, x_stride, n, k, 0, 0);
    Phase phase;
#pragma omp parallel
    multiply<P>(phase, {w, rows, k, w_stride}, u, n, [&](int64_t r, int64_t o, float s) {
        T rounded;
        put(&rounded, s);
        out[r * rows + o] = widen(rounded);
    });
    map(n * rows, out, out, [&](vec v, int64_t) { return cap * tanh(v / cap); });
}

template <class P, class T = typename P::Stored>
void mlp(const T* x, const T* fc, const T* proj, T* out, int64_t n, int64_t d, int64_t hidden, int64_t x_stride,
         int64_t fc_stride, int64_t proj_stride, float d_ref, float eps) {
    const auto* u = inputs<P>(1, x, x_stride, n, d, d_ref, eps);
    auto* y = scratch<typename P::Input>(2, n * padded(hidden));
    Phase up, down;
#pragma omp parallel
    {
        up.wait(multiply<P>(up, {fc, hidden, d, fc_stride}, u, n, [&](int64_t r, int64_t o, float s) {
            s = std::max(s, 0.0f);
            put_input<P>(y + r * padded(hidden) + o, s * s);
        }));
        multiply<P>(down, {proj, d, hidden, proj_stride}, y, n,
                    [&](int64_t r, int64_t o, float s) { put(out + r * d + o, s); });
    }
}

// What lies between the projections of a Mamba-2 mixer. The tokens of a row lie `step` values apart in memory, each with
// its inputs x, B, C of the conv and, behind them, a dt per head; the states `before` and `after` them may be one memory.
template <class T> struct Mixer {
    const float *conv_w, *conv_b, *dt_bias, *A_log, *D;
    int64_t d_inner, H, N, G, K;
    int64_t channels() const { return d_inner + 2 * G * N; }

    // act (tokens, channels): the causal conv's channels from..to, and silu; the conv's window moves on
    void convolve(const T* x, int64_t step, int64_t tokens, const T* before, T* after, int64_t from, int64_t to,
                  float* act) const {
        auto input = [&](int64_t t) { return t < 0 ? before + (K + t) * channels() : x + t * step; };
        for (int64_t t = 0; t < tokens; t++) {
            float* a = act + t * channels();
            std::copy(conv_b + from, conv_b + to, a + from);
            for (int64_t j = 0; j < K; j++) {
                const T* w = input(t - K + 1 + j);
                for (int64_t c = from; c < to; c++) a[c] += widen(w[c]) * conv_w[c * K + j];
            }
            map(to - from, a + from, a + from, [](vec v, int64_t) { return silu(v); });
        }
        for (int64_t j = 0; j < K; j++) {   // in this order one memory may hold both windows
            const T* w = input(tokens - K + j);
            for (int64_t c = from; c < to; c++) after[j * channels() + c] = w[c];
        }
    }

    // y (tokens, d_inner), head h: S = decay S + dt x B^T, y = S C + D x. A row of S goes through all tokens at once: each
    // state is read and written once, however many they are. y null: S alone.
    void scan(int64_t h, const T* x, int64_t step, int64_t tokens, const float* act, const float* before, float* after,
              float* y) const {
        const int64_t headdim = d_inner / H;
        float *dt = scratch<float>(5, tokens), *decay = scratch<float>(6, tokens);
        for (int64_t t = 0; t < tokens; t++) {
            const float raw = widen(x[t * step + channels() + h]) + dt_bias[h];
            dt[t] = raw > 20 ? raw : std::log1p(std::exp(raw));
            decay[t] = std::exp(-dt[t] * std::exp(A_log[h]));
        }
        for (int64_t p = 0; p < headdim; p++) {
            const float* from = before + (h * headdim + p) * N;
            float* S = after + (h * headdim + p) * N;
            for (int64_t t = 0; t < tokens; t++, from = S) {
                const float *a = act + t * channels(), *B = a + d_inner + h * G / H * N, *C = B + G * N;
                const float xp = a[h * headdim + p], in = dt[t] * xp;
                vec s = {};
                map(N, from, S, [&](vec v, int64_t i) {
                    const bool whole = i + LANES <= N;
                    v = v * decay[t] + in * (whole ? load(B + i) : load_part(B + i, N - i));
                    if (y) s += v * (whole ? load(C + i) : load_part(C + i, N - i));
                    return v;
                });
                if (y) y[t * d_inner + h * headdim + p] = sum(s) + D[h] * xp;
            }
        }
    }
};

// T tokens per row of a Mamba-2 mixer, n in all; the states before them and after them may be one memory. projected
// (n, [z,] x, B, C, dt) receives in_proj's outputs; write_only: the weights come without z's rows, and nothing behind the
// states is computed.
template <class P, class T = typename P::Stored>
void mamba(const T* x, const T* in_proj, const T* out_proj, T* out, T* projected, const T* conv_before, T* conv_after,
           const float* ssm_before, float* ssm_after, const float* conv_w, const float* conv_b, const float* dt_bias,
           const float* A_log, const float* D, const float* norm_w, int64_t n, int64_t tokens, int64_t d_model,
           int64_t d_inner, int64_t H, int64_t N, int64_t G, int64_t K, int64_t x_stride, int64_t conv_stride,
           int64_t ssm_stride, int64_t write_only, float eps) {
    const Mixer<T> mixer{conv_w, conv_b, dt_bias, A_log, D, d_inner, H, N, G, K};
    const int64_t channels = mixer.channels(), z = write_only ? 0 : d_inner, width = z + channels + H, rows = n / tokens;
    const int64_t headdim = d_inner / H, group = d_inner / G, piece = 64, pieces = (channels + piece - 1) / piece;
    const auto* u = inputs<P>(1, x, x_stride, n, d_model, 0, 0);
    auto* normed = scratch<typename P::Input>(2, n * padded(d_inner));
    float *act = scratch<float>(3, n * channels), *y = scratch<float>(4, n * d_inner);
    Phase project, convolve, scan, norm, back;
#pragma omp parallel
    {
        project.wait(multiply<P>(project, {in_proj, width, d_model, d_model}, u, n,
                                 [&](int64_t r, int64_t o, float s) { put(projected + r * width + o, s); }));
        convolve.run(rows * pieces, [&](int64_t i) {
            const int64_t r = i / pieces, from = i % pieces * piece, to = std::min(from + piece, channels);
            mixer.convolve(projected + r * tokens * width + z, width, tokens, conv_before + r * conv_stride,
                           conv_after + r * conv_stride, from, to, act + r * tokens * channels);
        });
        convolve.wait(rows * pieces);
        scan.run(rows * H, [&](int64_t i) {
            const int64_t r = i / H, h = i % H;
            const T* own = projected + r * tokens * width;
            float* yr = y + r * tokens * d_inner;
            mixer.scan(h, own + z, width, tokens, act + r * tokens * channels, ssm_before + r * ssm_stride,
                       ssm_after + r * ssm_stride, write_only ? nullptr : yr);
            for (int64_t t = 0; t < tokens && !write_only; t++) {
                float* yh = yr + t * d_inner + h * headdim;
                map(headdim, own + t * width + h * headdim, yh, [&](vec v, int64_t i) {
                    return silu(v) * (i + LANES <= headdim ? load(yh + i) : load_part(yh + i, headdim - i));
                });
            }
        });
        if (!write_only) {
            scan.wait(rows * H);
            norm.run(n * G, [&](int64_t i) {
                const int64_t r = i / G, g = i % G;
                const float *v = y + r * d_inner + g * group, *w = norm_w + g * group;
                const float scale = 1 / std::sqrt(dot(group, v, v) / group + eps);
                for (int64_t c = 0; c < group; c++)
                    put_input<P>(normed + r * padded(d_inner) + g * group + c, v[c] * scale * w[c]);
            });
            norm.wait(n * G);
            multiply<P>(back, {out_proj, d_model, d_inner, d_inner}, normed, n,
                        [&](int64_t r, int64_t o, float s) { put(out + r * d_model + o, s); });
        }
    }
}

// Advances the states of each row, in place, over the first counts[row] of its `tokens` projected ones (rows, tokens,
// x, B, C, dt): what a mixer's states need of tokens that went through in_proj before.
template <class P, class T = typename P::Stored>
void replay(const T* projected, T* conv_state, float* ssm_state, const int64_t* counts, const float* conv_w,
            const float* conv_b, const float* dt_bias, const float* A_log, int64_t rows, int64_t tokens, int64_t d_inner,
            int64_t H, int64_t N, int64_t G, int64_t K, int64_t conv_stride, int64_t ssm_stride) {
    const Mixer<T> mixer{conv_w, conv_b, dt_bias, A_log, nullptr, d_inner, H, N, G, K};
    const int64_t channels = mixer.channels(), width = channels + H, piece = 64, pieces = (channels + piece - 1) / piece;
    float* act = scratch<float>(3, rows * tokens * channels);
    Phase convolve, scan;
#pragma omp parallel
    {
        convolve.run(rows * pieces, [&](int64_t i) {
            const int64_t r = i / pieces, from = i % pieces * piece, to = std::min(from + piece, channels);
            T* window = conv_state + r * conv_stride;
            mixer.convolve(projected + r * tokens * width, width, counts[r], window, window, from, to,
                           act + r * tokens * channels);
        });
        convolve.wait(rows * pieces);
        scan.run(rows * H, [&](int64_t i) {
            const int64_t r = i / H;
            float* state = ssm_state + r * ssm_stride;
            mixer.scan(i % H, projected + r * tokens * width, width, counts[r], act + r * tokens * channels, state, state,
                       nullptr);
        });
    }
}

}  // namespace
