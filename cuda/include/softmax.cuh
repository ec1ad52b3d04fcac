// The online softmax of the rows that a warp's accumulators hold, in powers of 2 (log2 e is folded
// into the scale):
//
//     p_j = 2^(scale · (s_j - base))     sum = Σ_j p_j     out = Σ_j p_j v_j
//
// `base` is a score near the row's maximum. It follows the maximum only when that runs away by more
// than `slack`, so that sum and out are seldom rescaled.
//
// Row 16 i + l / 4 + 8 half of a warp's rows is shared by the four lanes of l / 4: each has the
// columns 8 j + 2 (l % 4) and the next one, in [i][j][2 half] and [i][j][2 half + 1].
#pragma once

#include "device.cuh"

DEVICE float quad_max(float x) {
    x = max_ignoring_nan(x, shuffle_xor(x, 1));
    return max_ignoring_nan(x, shuffle_xor(x, 2));
}

DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

// 2^(scale · (score - base)); before anything was seen there is no base, and any gives 0.
DEVICE float power(float score, float base, float scale_log2) {
    return exp2_approx(score * scale_log2 - (base == -infinity() ? 0.0f : base * scale_log2));
}

// tanh(ln 2 / 2 · x) = 1 - 2 / (1 + 2^x), to 4 units in the last place; NaN stays. Near 0 that
// difference cancels, and the odd polynomial of the least relative error (3e-8 below tanh 0.55)
// does not.
DEVICE float tanh_log2(float x) {
    const float square = x * x;
    float near = 1.17695015e-6f;
    near = near * square - 3.15839025e-5f;
    near = near * square + 6.65955071e-4f;
    near = near * square - 1.38758030e-2f;
    near = near * square + 0.346573591f;
    const float far = 1 - 2 * reciprocal_approx(1 + exp2_approx(x));
    return absolute(x) < 1.58696454f ? near * x : far;
}

template <int RowTiles>
struct Softmax {
    float scale_log2;
    float slack;
    float base[RowTiles][2];
    // Of this lane's columns until `finish`.
    float sum[RowTiles][2];

    DEVICE Softmax(float scale_log2, float slack) : scale_log2(scale_log2), slack(slack) {
#pragma unroll
        for (int i = 0; i < RowTiles; i++) {
            base[i][0] = base[i][1] = -infinity();
            sum[i][0] = sum[i][1] = 0;
        }
    }

    // For scores that are `factor` times larger.
    DEVICE void scale_by(float factor) {
        scale_log2 = max_ignoring_nan(scale_log2 * factor, 1.17549435e-38f);
        const float most = slack / factor;
        slack = most < 1e30f ? most : 1e30f;
    }

    // Moves the base where the scores ask for it.
    template <int Columns, int Outputs>
    DEVICE void rebase(const float (&scores)[RowTiles][Columns][4], float (&out)[RowTiles][Outputs][4]) {
        float highest[RowTiles][2];
        if (!is_stale(scores, highest)) {
            return;
        }
#pragma unroll
        for (int i = 0; i < RowTiles; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float rescale = follow(i, half, highest[i][half]);
#pragma unroll
                for (int j = 0; j < Outputs; j++) {
                    out[i][j][2 * half] *= rescale;
                    out[i][j][2 * half + 1] *= rescale;
                }
            }
        }
    }

    // The same, but for outputs: if this says so, they are yet to be multiplied by the factors.
    template <int Columns>
    DEVICE bool move_base(const float (&scores)[RowTiles][Columns][4], float (&factors)[RowTiles][2]) {
        float highest[RowTiles][2];
        if (!is_stale(scores, highest)) {
            return false;
        }
#pragma unroll
        for (int i = 0; i < RowTiles; i++) {
            factors[i][0] = follow(i, 0, highest[i][0]);
            factors[i][1] = follow(i, 1, highest[i][1]);
        }
        return true;
    }

    template <int Outputs>
    static DEVICE void rescale(float (&out)[RowTiles][Outputs][4], const float (&factors)[RowTiles][2]) {
#pragma unroll
        for (int i = 0; i < RowTiles; i++) {
#pragma unroll
            for (int j = 0; j < Outputs; j++) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    out[i][j][c] *= factors[i][c / 2];
                }
            }
        }
    }

    // The rows' highest scores; whether one of the warp's has run away from its base.
    template <int Columns>
    DEVICE bool is_stale(const float (&scores)[RowTiles][Columns][4], float (&highest)[RowTiles][2]) const {
        bool stale = false;
#pragma unroll
        for (int i = 0; i < RowTiles; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float x = scores[i][0][2 * half];
#pragma unroll
                for (int j = 0; j < Columns; j++) {
                    x = max_ignoring_nan(x, scores[i][j][2 * half]);
                    x = max_ignoring_nan(x, scores[i][j][2 * half + 1]);
                }
                highest[i][half] = quad_max(x);
                stale |= highest[i][half] > base[i][half] + slack;
            }
        }
        return any_lane(stale);
    }

    // Moves a row's base if it is stale itself (its bits do not depend on others'), and its sum; what
    // its outputs are multiplied by.
    DEVICE float follow(int i, int half, float highest) {
        const bool follows = highest > base[i][half] + slack;
        const float rescale = follows ? power(base[i][half], highest, scale_log2) : 1.0f;
        base[i][half] = follows ? highest : base[i][half];
        sum[i][half] *= rescale;
        return rescale;
    }

    // Turns scores into probabilities.
    template <int Columns>
    DEVICE void exponentiate(float (&scores)[RowTiles][Columns][4]) {
#pragma unroll
        for (int i = 0; i < RowTiles; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float shift = base[i][half] == -infinity() ? 0.0f : base[i][half] * scale_log2;
#pragma unroll
                for (int j = 0; j < Columns; j++) {
#pragma unroll
                    for (int c = 2 * half; c < 2 * half + 2; c++) {
                        scores[i][j][c] = exp2_approx(scores[i][j][c] * scale_log2 - shift);
                        sum[i][half] += scores[i][j][c];
                    }
                }
            }
        }
    }

    // Sums over all columns.
    DEVICE void finish() {
#pragma unroll
        for (int i = 0; i < RowTiles; i++) {
            sum[i][0] = quad_sum(sum[i][0]);
            sum[i][1] = quad_sum(sum[i][1]);
        }
    }
};

// Probabilities in 16 bits: the accumulators of two 16×8 products lie as the left operand of one
// 16×16 does.
template <class Element, int RowTiles, int Columns>
DEVICE void pack(uint32_t (&to)[RowTiles][Columns / 2][4], const float (&scores)[RowTiles][Columns][4]) {
#pragma unroll
    for (int i = 0; i < RowTiles; i++) {
#pragma unroll
        for (int j = 0; j < Columns; j++) {
            to[i][j / 2][j % 2 * 2] = Element::pack(scores[i][j][0], scores[i][j][1]);
            to[i][j / 2][j % 2 * 2 + 1] = Element::pack(scores[i][j][2], scores[i][j][3]);
        }
    }
}

// ln Σ e^s of a row, from its base and sum of powers; -inf if it saw no key.
DEVICE float log_sum_exp(float base, float sum, float scale_log2) {
    constexpr float ln_2 = 0.6931471805599453f;
    return sum == 0 ? -infinity() : base * scale_log2 * ln_2 + log_accurate(sum);
}

// What a row's sum of outputs is multiplied by; 0 if it saw no key.
DEVICE float normaliser(float sum) { return sum == 0 ? 0.0f : reciprocal_approx(sum); }

// An output from its sum. -0 becomes 0: a step in which a row sees nothing may change that sign.
DEVICE float normalised(float out, float scale) { return out * scale + 0.0f; }

// A row whose softmax has one more term, e^sink, without a value; a sink of -inf is none. The steps
// are those of merge.cu: a row has the same bits whether its keys are split or not.
struct WithSink {
    float weight = 1, scale = 1;
    float lse;

    // `own` is the log-sum-exp of the keys.
    DEVICE WithSink(float own, float sink) : lse(own) {
        if (sink != -infinity()) {
            const float max = own > sink || own != own ? own : sink;
            weight = exp_accurate(own - max);
            const float sum = exp_accurate(sink - max) + weight;
            scale = 1 / sum;
            lse = max + log_accurate(sum);
        }
    }

    // An output from that of the keys.
    DEVICE float output(float own) const { return (0.0f + weight * own) * scale; }
};
