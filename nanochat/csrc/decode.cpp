// Decoding on a CPU: what a few tokens (rows) ask of a norm, a linear layer, an attention, an MLP and a Mamba-2 mixer.
//
// One row makes every weight matrix a stream that is read once, so an operator is as fast as its reading: weight rows are
// streamed one after another, several input rows share each reading, and all of a layer, or of a run of blocks, happens in
// one call, since a framework's small operators take longer than the arithmetic they stand for. Weights, caches and
// activations are fp32 or bf16 in memory; sums, norms, softmax and the SSM state are fp32; a product's input is rounded to
// its weights' type.
//
// The functions at the end are called by nanochat/cpu_decode.py and block_run.py, which state shapes and check them; the
// same functions in PyTorch, for whatever does not come here, are in matryoshka.py and mamba_block.py. Nothing here keeps a
// pointer.
// Vectors are GCC's, 16 floats wide, which it lowers to what the CPU has; only the bf16 product has an own instruction.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using vec = float __attribute__((vector_size(64)));
using ivec = int32_t __attribute__((vector_size(64)));
using hvec = uint16_t __attribute__((vector_size(32)));
using bf16 = uint16_t;
constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 24;           // weight rows that a thread takes at a time; divides by every tile's height

// --- loads, stores, elementary functions -----------------------------------------------------------------------------

inline vec load(const float* p) { vec v; memcpy(&v, p, sizeof v); return v; }
inline vec load(const bf16* p) {
    hvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, ivec) << 16);
}
template <class T> inline vec load_part(const T* p, int64_t n) {  // n < LANES values, zeros behind them
    T whole[LANES] = {};
    memcpy(whole, p, n * sizeof(T));
    return load(whole);
}
inline float widen(float x) { return x; }
inline float widen(bf16 x) { uint32_t b = uint32_t(x) << 16; float f; memcpy(&f, &b, 4); return f; }
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {     // to the nearest, ties to even
    uint32_t b;
    memcpy(&b, &x, 4);
    *p = x == x ? bf16((b + 0x7fff + (b >> 16 & 1)) >> 16) : 0x7fc0;
}
template <class Half, class Whole> inline Half fold(Whole v) {
    Half halves[2];
    memcpy(halves, &v, sizeof v);
    return halves[0] + halves[1];
}
inline float sum(vec v) {
    using v8 = float __attribute__((vector_size(32)));
    using v4 = float __attribute__((vector_size(16)));
    v4 s = fold<v4>(fold<v8>(v));
    return (s[0] + s[2]) + (s[1] + s[3]);
}
inline vec exp(vec x) {                 // relative error below 2e-7; saturates instead of overflowing
    x = x < -87.0f ? vec{} - 87.0f : x > 88.0f ? vec{} + 88.0f : x;
    const float magic = 12582912.0f;    // 1.5 * 2^23: adding it rounds to an integer
    vec n = (x * 1.44269504f + magic) - magic;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 1.0f / 5040 + vec{};
    for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
    return p * (vec)((__builtin_convertvector(n, ivec) + 127) << 23);
}
inline vec silu(vec x) { return x / (1.0f + exp(-x)); }
inline vec tanh(vec x) {                // near 0 the quotient would lose digits
    const vec s = x * x, e = exp(2.0f * x);
    const vec small = x + x * s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835))));
    return s < 0.04f ? small : (e - 1.0f) / (e + 1.0f);
}

// f(vector of p[i..]) is stored back to q[i..], for n values of any number
template <class T, class F> inline void map(int64_t n, const T* p, float* q, F f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) { vec v = f(load(p + i), i); memcpy(q + i, &v, sizeof v); }
    if (i < n) { vec v = f(load_part(p + i, n - i), i); memcpy(q + i, &v, (n - i) * sizeof(float)); }
}
template <class A, class B> inline float dot(int64_t n, const A* a, const B* b) {
    vec s = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) s += load(a + i) * load(b + i);
    if (i < n) s += load_part(a + i, n - i) * load_part(b + i, n - i);
    return sum(s);
}

// Memory of the calling thread that stays for its next call: one piece per slot, 64 bytes aligned, contents undefined.
template <class T> T* scratch(int slot, int64_t count) {
    static thread_local std::vector<char> memory[11];
    auto& m = memory[slot];
    if (m.size() < count * sizeof(T) + 64) m.resize(count * sizeof(T) + 64);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(m.data()) + 63) & ~uintptr_t(63));
}

// --- threads ---------------------------------------------------------------------------------------------------------

// An operator is one parallel region of several phases, each a loop whose pieces the threads take as they come. What waits
// for a phase waits for its pieces, not for the threads, as a barrier would: a thread that another process has displaced
// for some milliseconds keeps nobody waiting unless it holds a piece.
class Phase {
    std::atomic<int64_t> done{0};
public:
    // f(0..pieces-1). Every thread of the region calls it; returns where no piece is left to take.
    template <class F> void run(int64_t pieces, F f) {
        int64_t own = 0;
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < pieces; i++) { f(i); own++; }
        done.fetch_add(own, std::memory_order_release);
    }
    void wait(int64_t pieces) const {
        while (done.load(std::memory_order_acquire) < pieces) {
#ifdef __x86_64__
            __builtin_ia32_pause();
#endif
        }
    }
};

// --- linear ----------------------------------------------------------------------------------------------------------

// A type of weights: Stored in memory, multiplied in packs of STEP with an Input of their own precision.
struct Fp32 {
    using Stored = float;
    using Input = float;
    using Pack = vec;
    static constexpr int64_t STEP = LANES;
    static Pack pack(const float* p) { return load(p); }
    static vec add(vec s, Pack w, Pack x) { return s + w * x; }
};
struct Bf16 {
    using Stored = bf16;
#ifdef __AVX512BF16__
    using Input = bf16;
    using Pack = __m512bh;
    static constexpr int64_t STEP = 2 * LANES;
    static Pack pack(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static vec add(vec s, Pack w, Pack x) { return (vec)_mm512_dpbf16_ps((__m512)s, w, x); }
#else
    using Input = float;                // holding bf16 values
    using Pack = vec;
    static constexpr int64_t STEP = LANES;
    static Pack pack(const bf16* p) { return load(p); }
    static Pack pack(const float* p) { return load(p); }
    static vec add(vec s, Pack w, Pack x) { return s + w * x; }
#endif
};
template <class P, class T> inline typename P::Pack pack_part(const T* p, int64_t n) {
    T whole[P::STEP] = {};
    memcpy(whole, p, n * sizeof(T));
    return P::pack(whole);
}
template <class P> inline void put_input(typename P::Input* p, float x) {
    typename P::Stored rounded;
    put(&rounded, x);
    if constexpr (std::is_same_v<typename P::Input, typename P::Stored>) *p = rounded; else *p = widen(rounded);
}
inline int64_t padded(int64_t k) { return (k + 31) / 32 * 32 + 32; }  // distance of input rows, in values, not a power of two

template <class P> struct Matrix { const typename P::Stored* w; int64_t rows, k, stride; };

// y (R, O) = R input rows times O weight rows, which lie `stride` apart. A single input row calls for no weights ahead of
// their use: the CPU's own prefetching reads one stream at 24 GB/s a core, with instructions for it, whatever their distance
// and level, it was 15 to 20. Several rows take longer than the reading, and the next weights come into the second-level
// cache meanwhile: eight rows then cost 1.1 (fp32) of one.
template <class P, int R, int O>
void tile(const typename P::Stored* w, int64_t stride, int64_t k, const typename P::Input* x, float* y) {
    const int64_t pad = padded(k);
    vec s[R][O] = {};
    auto step = [&](auto pack, int64_t i) {
        typename P::Pack b[O];
        for (int o = 0; o < O; o++) {
            b[o] = pack(w + o * stride + i);
            if (R > 1) __builtin_prefetch(w + (O + o) * stride + i, 0, 2);
        }
        for (int r = 0; r < R; r++) {
            typename P::Pack a = pack(x + r * pad + i);
            for (int o = 0; o < O; o++) s[r][o] = P::add(s[r][o], b[o], a);
        }
    };
    int64_t i = 0;
    for (; i + P::STEP <= k; i += P::STEP) step([](auto* p) { return P::pack(p); }, i);
    if (i < k) step([&](auto* p) { return pack_part<P>(p, k - i); }, i);
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++) y[r * O + o] = sum(s[r][o]);
}

// The input rows row..row+R-1 times the weight rows from..to, by tiles as large as the vector registers.
template <class P, int R, class Emit>
void strip(const Matrix<P>& m, int64_t from, int64_t to, const typename P::Input* x, int64_t row, Emit emit) {
    constexpr int O = R >= 7 ? 3 : R >= 5 ? 4 : R >= 3 ? 6 : R == 2 ? 8 : 1;
    for (int64_t o = from; o < to;) {
        float y[R * O];
        const int got = o + O <= to ? O : 1;
        auto run = got == O ? tile<P, R, O> : tile<P, R, 1>;
        run(m.w + o * m.stride, m.stride, m.k, x + row * padded(m.k), y);
        for (int r = 0; r < R; r++)
            for (int j = 0; j < got; j++) emit(row + r, o + j, y[r * got + j]);
        o += got;
    }
}

// emit(row, o, product) for all n input rows and all weight rows, as part of a phase. Returns its number of pieces.
template <class P, class Emit>
int64_t multiply(Phase& phase, const Matrix<P>& m, const typename P::Input* x, int64_t n, Emit emit) {
    const int64_t pieces = (m.rows + BLOCK - 1) / BLOCK;
    phase.run(pieces, [&](int64_t i) {
        const int64_t from = i * BLOCK, to = std::min(from + BLOCK, m.rows);
        int64_t row = 0;
        for (; row + 8 <= n; row += 8) strip<P, 8>(m, from, to, x, row, emit);
        switch (n - row) {
            case 1: return strip<P, 1>(m, from, to, x, row, emit);
            case 2: return strip<P, 2>(m, from, to, x, row, emit);
            case 3: return strip<P, 3>(m, from, to, x, row, emit);
            case 4: return strip<P, 4>(m, from, to, x, row, emit);
            case 5: return strip<P, 5>(m, from, to, x, row, emit);
            case 6: return strip<P, 6>(m, from, to, x, row, emit);
            case 7: return strip<P, 7>(m, from, to, x, row, emit);
        }
    });
    return pieces;
}

// Rows (n, k) at distance `stride`, normed unless d_ref is 0, as a product's input (n, padded(k)).
template <class P>
typename P::Input* inputs(int slot, const typename P::Stored* x, int64_t stride, int64_t n, int64_t k, float d_ref,
                          float eps) {
    auto* u = scratch<typename P::Input>(slot, n * padded(k));
    for (int64_t r = 0; r < n; r++) {
        const auto* p = x + r * stride;
        const float scale = d_ref ? 1 / std::sqrt(dot(k, p, p) / d_ref + eps) : 1;
        for (int64_t i = 0; i < k; i++) put_input<P>(u + r * padded(k) + i, widen(p[i]) * scale);
    }
    return u;
}

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

// Where tokens stand in the cache: given one by one, or, row null, `tokens` in each row from position `start` on.
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

// --- a run of blocks -------------------------------------------------------------------------------------------------

// What a block brings to a run of them: weights, the memory behind the tokens so far, and the level of its attention and
// MLP. Every member is one 64-bit word, as block_run.py writes them; those of the other kind of block are unused.
template <class T> struct Block {
    int64_t mamba, d;
    const T *fc, *proj;
    const T *wq, *wk, *wv, *wo, *gate, *table;  // gate and table, the value embeddings, may be null
    T *keys, *values;
    const int16_t* heads;
    const T *in_proj, *out_proj;
    const float *conv_w, *conv_b, *dt_bias, *A_log, *D, *norm_w;
    T* projected;                               // null: nobody records it
    const T* conv_before;
    T* conv_after;
    const float* ssm_before;
    float* ssm_after;
};
struct Sizes {  // what all blocks have in common
    int64_t D, top, hd, group, gate_in, table_stride, row_stride, head_stride, length;
    int64_t d_inner, H, N, G, K, conv_stride, ssm_stride;
};
// The confidence gate, in fp32: `point` and `proj` have a row for each exit point; points[i] is its number behind i blocks,
// or -1.
struct Gate {
    const float *fc, *point, *proj, *bias;
    const int64_t* points;
    int64_t hidden;
};

// ConfidenceGate.forward for one token's state x (D), and the sigmoid.
template <class P, class T = typename P::Stored>
float confidence(const Gate& gate, int64_t point, const T* x, int64_t D, float d_ref, float eps) {
    constexpr int64_t PEAK = 3;
    T* normed = scratch<T>(8, D);
    norm<P>(x, normed, 1, D, d_ref, eps);
    float *wide = scratch<float>(9, D), *u = scratch<float>(10, gate.hidden);
    for (int64_t i = 0; i < D; i++) wide[i] = widen(normed[i]);
    linear<Fp32>(wide, gate.fc, u, 1, D, gate.hidden, D, D);
    float first = -INFINITY, second = -INFINITY;
    for (int64_t j = 0; j < gate.hidden; j++) {
        u[j] += gate.point[point * gate.hidden + j];
        second = std::max(second, std::min(first, u[j]));
        first = std::max(first, u[j]);
    }
    float total = 0;
    for (int64_t j = 0; j < gate.hidden; j++) total += std::exp(u[j] - first);
    const float likeliest = std::min(-std::log(total), -1e-6f);
    const float *w = gate.proj + point * (PEAK + gate.hidden);
    float logit = gate.bias[point] + w[0] * likeliest + w[1] * std::log(-std::expm1(likeliest)) + w[2] * (first - second);
    for (int64_t j = 0; j < gate.hidden; j++) {
        const float r = std::max(u[j], 0.0f);
        logit += w[PEAK + j] * r * r;
    }
    return 1 / (1 + std::exp(-logit));
}

// x (n, D) += y (n, d)
template <class T> void add(T* x, const T* y, int64_t n, int64_t D, int64_t d) {
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < d; i++) put(x + r * D + i, widen(x[r * D + i]) + widen(y[r * d + i]));
}

// The blocks from `first` up to `last` for n tokens, `tokens` in a row: x (n, D), from `table` in front of block 0, is
// updated in place, or, if write_only, the blocks only write their memory of it. With a gate (and one token) the run ends at the first exit point at which there is
// something to decide: the gate is surer than `leave`, or, past half of all `count` blocks, less sure than `expand`. reached
// (2): how many blocks are done then, and whether there is; sure: the gate's answer where it was last asked.
template <class P, class T = typename P::Stored>
void blocks(const Block<T>* all, const Sizes* sizes, T* x, const int64_t* ids, const T* table, const float* cos,
            const float* sin, const int64_t* row, const int64_t* position, const Gate* gate, int64_t* reached, float* sure, int64_t n,
            int64_t tokens, int64_t start, int64_t first, int64_t last, int64_t count, int64_t rope_rows,
            int64_t write_only, float leave, float expand, float d_ref, float eps, float mixer_eps) {
    const Sizes& s = *sizes;
    const int64_t width = 2 * s.d_inner + 2 * s.G * s.N + s.H;
    for (int64_t r = 0; r < n && first == 0; r++) norm<P>(table + ids[r] * s.D, x + r * s.D, 1, s.D, d_ref, eps);
    for (int64_t i = first; i < last; i++) {
        const Block<T>& b = all[i];
        T* y = write_only ? nullptr : scratch<T>(7, n * s.D);
        if (b.mamba) {
            T* u = scratch<T>(8, n * s.D);
            norm<P>(x, u, n, s.D, d_ref, eps);
            T* projected = b.projected ? b.projected : scratch<T>(9, n * width);
            mamba<P>(u, b.in_proj + (write_only ? s.d_inner * s.D : 0), b.out_proj, y, projected, b.conv_before,
                     b.conv_after, b.ssm_before, b.ssm_after, b.conv_w, b.conv_b, b.dt_bias, b.A_log, b.D, b.norm_w, n,
                     tokens, s.D, s.d_inner, s.H, s.N, s.G, s.K, s.D, s.conv_stride, s.ssm_stride, write_only, mixer_eps);
        } else {
            attention<P>(x, y, b.wq, b.wk, b.wv, b.wo, b.gate, b.table, ids, cos, sin, b.keys, b.values, b.heads, row,
                         position, n, b.d, s.D, s.top, s.hd, s.group, s.gate_in, s.table_stride, rope_rows, s.row_stride,
                         s.head_stride, s.length, write_only, tokens, start, d_ref, eps);
        }
        if (write_only) continue;
        add(x, y, n, s.D, b.mamba ? s.D : b.d);
        mlp<P>(x, b.fc, b.proj, y, n, b.d, 4 * b.d, s.D, s.top, 4 * s.top, d_ref, eps);
        add(x, y, n, s.D, b.d);
        if (gate && i + 1 < count && gate->points[i + 1] >= 0) {
            *sure = confidence<P>(*gate, gate->points[i + 1], x, s.D, d_ref, eps);
            if (*sure > leave || (2 * (i + 1) > count && *sure < expand)) {
                reached[0] = i + 1, reached[1] = 1;
                return;
            }
        }
    }
    reached[0] = last, reached[1] = 0;
}

}  // namespace

// Each operator once per type of weights. The names stand for pointers to functions, which spares a second list of their
// arguments; all take pointers first, then sizes, then floats.
#define EXPORT(op) \
    extern "C" { \
    auto* op##_float32 = &op<Fp32>; \
    auto* op##_bfloat16 = &op<Bf16>; \
    }
EXPORT(norm)
EXPORT(linear)
EXPORT(head)
EXPORT(mlp)
EXPORT(attention)
EXPORT(mamba)
EXPORT(replay)
EXPORT(blocks)
