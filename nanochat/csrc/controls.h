// The two controls of mode auto, in fp32 whatever the model's weights are: confidence_probe.py's gate, for one token's
// state, and predictor, for whole prompts.
#pragma once
#include "layers.h"

namespace {

// The confidence gate: `point` and `proj` have a row for each exit point; points[i] is its number behind i blocks,
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
    float *wide = scratch<float>(9, std::max(D, gate.hidden)), *u = scratch<float>(10, gate.hidden);
    for (int64_t i = 0; i < D; i++) wide[i] = widen(normed[i]);
    linear<Fp32>(wide, gate.fc, u, 1, D, gate.hidden, D, D);
    float first = -INFINITY, second = -INFINITY;
    for (int64_t j = 0; j < gate.hidden; j++) {
        u[j] += gate.point[point * gate.hidden + j];
        second = std::max(second, std::min(first, u[j]));
        first = std::max(first, u[j]);
    }
    float *e = wide, total = 0;     // the state is no longer needed
    map(gate.hidden, u, e, [&](vec unit, int64_t) { return exp(unit - first); });
    for (int64_t j = 0; j < gate.hidden; j++) total += e[j];
    const float likeliest = std::min(-std::log(total), -1e-6f);
    const float *w = gate.proj + point * (PEAK + gate.hidden);
    float logit = gate.bias[point] + w[0] * likeliest + w[1] * std::log(-std::expm1(likeliest)) + w[2] * (first - second);
    for (int64_t j = 0; j < gate.hidden; j++) {
        const float r = std::max(u[j], 0.0f);
        logit += w[PEAK + j] * r * r;
    }
    return 1 / (1 + std::exp(-logit));
}

// LayerDimPredictor.forward for `rows` prompts of at most `tokens` tokens, those with `valid` (null: all), from the
// embeddings' table: values (rows, blocks, gains + 1). in (hidden, D), mid (hidden, 2 hidden + 1 + bumps), out (blocks,
// gains, hidden). chosen (rows, blocks), unless null: the best level of each block after it has paid `price` for its
// `shares` (blocks, gains + 1) of the compute, of equal ones the narrower. A prompt's values do not depend on the others'.
template <class P, class T = typename P::Stored>
void predictor(const int64_t* ids, const uint8_t* valid, const T* table, const float* in, const float* mid,
               const float* mid_bias, const float* out, const float* out_bias, const float* budget, float* values,
               const double* shares, const double* price, int64_t* chosen, int64_t rows, int64_t tokens, int64_t D,
               int64_t hidden, int64_t bumps, int64_t blocks, int64_t gains, float d_ref, float eps, float cap) {
    constexpr int64_t SOME = 48;    // tokens at a time
    const int64_t width = 2 * hidden + 1 + bumps;
    T* normed = scratch<T>(7, D);
    float *e = scratch<float>(8, SOME * D), *f = scratch<float>(9, SOME * hidden), *u = scratch<float>(10, width + hidden);
    float* h = u + width;
    for (int64_t r = 0; r < rows; r++, ids += tokens, values += blocks * (gains + 1)) {
        int64_t n = 0;
        std::fill_n(u, hidden, 0.0f);
        std::fill_n(u + hidden, hidden, -INFINITY);
        for (int64_t t = 0; t < tokens;) {
            int64_t some = 0;
            for (; t < tokens && some < SOME; t++) {
                if (valid && !valid[r * tokens + t]) continue;
                norm<P>(table + ids[t] * D, normed, 1, D, d_ref, eps);
                for (int64_t i = 0; i < D; i++) e[some * D + i] = widen(normed[i]);
                some++;
            }
            if (!some) break;
            linear<Fp32>(e, in, f, some, D, hidden, D, D);
            map(some * hidden, f, f, [](vec x, int64_t) { return silu(x); });
            for (int64_t k = 0; k < some; k++)
                for (int64_t j = 0; j < hidden; j++) {
                    const float y = f[k * hidden + j];
                    u[j] += y, u[hidden + j] = std::max(u[hidden + j], y);
                }
            n += some;
        }
        for (int64_t j = 0; j < hidden; j++) u[j] /= n;
        u[2 * hidden] = std::log2(float(n)) / 8;
        for (int64_t k = 0; k < bumps; k++) {
            const float away = (budget[r] - float(k + 1) / bumps) * bumps;
            u[2 * hidden + 1 + k] = 4 * std::exp(-away * away);
        }
        linear<Fp32>(u, mid, h, 1, width, hidden, width, width);
        for (int64_t j = 0; j < hidden; j++) h[j] += mid_bias[j];
        map(hidden, h, h, [](vec x, int64_t) { return silu(x); });
        for (int64_t b = 0; b < blocks; b++) {
            float* v = values + b * (gains + 1);
            v[0] = 0;
            for (int64_t l = 0; l < gains; l++) {
                const int64_t at = b * gains + l;
                const float gain = cap * std::tanh(dot(hidden, h, out + at * hidden) / cap) + out_bias[at];
                v[l + 1] = v[l] + std::max(gain, 0.0f) + std::log1p(std::exp(-std::fabs(gain)));  // softplus
            }
            double best = -INFINITY;
            for (int64_t l = 0; l <= gains && chosen; l++) {
                const double left = v[l] - *price * shares[b * (gains + 1) + l];
                if (left > best) best = left, chosen[r * blocks + b] = l;
            }
        }
    }
}

}  // namespace
