// Decoding on a CPU: the operators of layers.h and controls.h, a run of blocks, and greedy decoding, each in one call, since
// a framework's small operators take longer than the arithmetic they stand for.
//
// The functions at the end are called by nanochat/cpu_decode.py and block_run.py, which state shapes and check them. Nothing
// here keeps a pointer.
#include "controls.h"

namespace {

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

// x (n, D) += y (n, d)
template <class T> void add(T* x, const T* y, int64_t n, int64_t D, int64_t d) {
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < d; i++) put(x + r * D + i, widen(x[r * D + i]) + widen(y[r * d + i]));
}

// The blocks from `first` up to `last` for n tokens, `tokens` in a row: x (n, D), from `table` in front of block 0, is
// updated in place, or, if write_only, the blocks only write their memory of it. With a gate, which is asked of the last
// token, the run ends at the first exit point at which there is something to decide: the gate is surer than `leave`, or,
// past half of all `count` blocks, less sure than `expand`. reached (2): how many blocks are done then, and whether there
// is; sure: the gate's answer where it was last asked.
template <class P, class T = typename P::Stored>
void blocks(const Block<T>* all, const Sizes* sizes, T* x, const int64_t* ids, const T* table, const float* cos,
            const float* sin, const int64_t* row, const int64_t* position, const Gate* gate, int64_t* reached, float* sure,
            int64_t n, int64_t tokens, int64_t start, int64_t first, int64_t last, int64_t count, int64_t rope_rows,
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
            *sure = confidence<P>(*gate, gate->points[i + 1], x + (n - 1) * s.D, s.D, d_ref, eps);
            if (*sure > leave || (2 * (i + 1) > count && *sure < expand)) {
                reached[0] = i + 1, reached[1] = 1;
                return;
            }
        }
    }
    reached[0] = last, reached[1] = 0;
}

// --- greedy decoding -------------------------------------------------------------------------------------------------

// One row's tokens, from the next to run on. Every member is one 64-bit word, as block_run.py writes them.
template <class T> struct Answer {
    int64_t start, limit;       // the position of the first token to run; how many to run at most
    int64_t prompt;             // how many tokens are the prompt, which comes before those that owe and this one
    int64_t owed;               // how many tokens before it may owe blocks their memory
    const int64_t* stops;       // (n_stop) tokens behind which it ends
    int64_t n_stop;
    int64_t* tokens;            // (limit + 1) the first to run and, behind it, those that are generated; before it, with
                                // their states, the tokens that owe, and before these the prompt
    int64_t* depth;             // (limit) how many blocks updated each
    T* states;                  // (limit, D) each behind those blocks
    int64_t* behind;            // of each block: how many of the last tokens owe it their memory
    const T* head;
    float* logits;
    int64_t vocab;
};

// Runs tokens, each through `depth` of all `count` blocks or, with a gate, until it is surer than `leave`, and generates the
// likeliest next ones. A fresh prompt runs beside the first of them, and one that waits behind some blocks goes on when a
// token comes by, and no further; then, what exited tokens owe these blocks is written. Where the gate is less sure than
// `expand` past half of the blocks the caller decides, and where a prompt waits that is not here the caller lets it go on.
// reached (3): how many tokens are done, the block before which the next one waits for the caller, or 0, and, in and out,
// how many blocks the prompt has gone through.
template <class P, class T = typename P::Stored>
void greedy(const Block<T>* all, const Sizes* sizes, const Answer<T>* answer, const T* table, const float* cos,
            const float* sin, const Gate* gate, int64_t* reached, float* sure, int64_t count, int64_t depth, float leave,
            float expand, float cap, float d_ref, float eps, float mixer_eps) {
    const Answer<T>& a = *answer;
    const int64_t D = sizes->D, angles = sizes->hd / 2, front = a.prompt + a.owed;
    int64_t ran = reached[2];
    auto run = [&](int64_t first, int64_t last, int64_t from, int64_t n, const Gate* gate, bool write_only) {
        blocks<P>(all, sizes, a.states + from * D, a.tokens + from, table, cos + (a.start + from) * angles,
                  sin + (a.start + from) * angles, nullptr, nullptr, gate, reached, sure, n, n, a.start + from, first, last,
                  count, n, write_only, leave, expand, d_ref, eps, mixer_eps);
    };
    for (int64_t t = 0; t < a.limit; t++) {
        int64_t i = 0;
        bool decided = false;
        while (i < depth && !decided) {
            int64_t stop = gate ? i + 1 : depth;    // the token surely goes as far as the next exit point
            while (stop < depth && gate->points[stop] < 0) stop++;
            if (!a.prompt && i < ran) stop = std::min(stop, ran);
            const int64_t beside = !t && !a.owed && ran == i ? a.prompt : 0;
            if (ran < stop && !beside) {
                if (!a.prompt) {
                    reached[0] = t, reached[1] = i;
                    return;
                }
                run(ran, stop, -front, a.prompt, nullptr, false);
            }
            ran = std::max(ran, stop);
            for (int64_t from = i, to; from < stop; from = to) {
                const int64_t late = a.behind[from];
                for (to = from; to < stop && a.behind[to] == late; to++) a.behind[to] = 0;
                if (late) run(from, to, t - late, late, nullptr, true);
            }
            run(i, stop, t - beside, 1 + beside, gate, false);
            i = stop, decided = reached[1];
        }
        reached[2] = ran;
        if (decided && *sure <= leave) {
            reached[0] = t, reached[1] = i;
            return;
        }
        for (int64_t b = i; b < count; b++) a.behind[b]++;
        a.depth[t] = i;
        T* h = scratch<T>(8, D);
        norm<P>(a.states + t * D, h, 1, D, d_ref, eps);
        head<P>(h, a.head, a.logits, 1, D, a.vocab, D, D, cap);
        a.tokens[t + 1] = std::max_element(a.logits, a.logits + a.vocab) - a.logits;
        if (std::any_of(a.logits, a.logits + a.vocab, [](float v) { return !std::isfinite(v); })) {
            a.tokens[t + 1] = -1;    // no token can be told: the caller stops
            reached[0] = t + 1, reached[1] = 0;
            return;
        }
        if (std::find(a.stops, a.stops + a.n_stop, a.tokens[t + 1]) != a.stops + a.n_stop) {
            reached[0] = t + 1, reached[1] = 0;
            return;
        }
    }
    reached[0] = a.limit, reached[1] = 0;
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
EXPORT(predictor)
EXPORT(blocks)
EXPORT(greedy)
