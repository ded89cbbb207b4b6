// Vectors, elementary functions, threads, and the product of a few rows with a weight matrix: what layers.h is made of.
//
// One row makes every weight matrix a stream that is read once, so an operator is as fast as its reading: weight rows are
// streamed one after another, and several input rows share each reading. Weights, caches and activations are fp32 or bf16 in
// memory; sums, norms, softmax and the SSM state are fp32; a product's input is rounded to its weights' type.
// Vectors are GCC's, 16 floats wide, which it lowers to what the CPU has; only the bf16 product has an own instruction.
#pragma once
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

}  // namespace
