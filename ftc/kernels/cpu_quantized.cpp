// Few rows times quantised weights: y[m, f] = sum_c x[m, c] (code[f, c] - zero[f, c / group]) scale[f, c / group], in float32.
//
// A decode step reads every weight once, so it is as fast as memory gives them: codes are read as they are stored and become floats in registers.
// Of one row of x the products are made at once; of several the row of weights is made into floats first, which stays in the nearest cache.

#include <cstdint>
#include <cstring>
#include <vector>

enum Kind { FP8 = 0, INT8 = 1, INT4 = 2 };

static inline float e4m3(uint8_t code) {  // its exponent and mantissa in a float's places; 2^120 makes up for the biases 7 and 127
    uint32_t bits = (uint32_t(code & 0x80) << 24) | (uint32_t(code & 0x7f) << 20);
    float value;
    std::memcpy(&value, &bits, 4);
    return value * 0x1p120f;
}

static float dot8(const int8_t* codes, const float* x, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += float(codes[i]) * x[i];
    return sum;
}

static float dot_fp8(const uint8_t* codes, const float* x, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += e4m3(codes[i]) * x[i];
    return sum;
}

constexpr int LANES = 16;  // bytes of INT4 at a time: a group of 32 columns

// sum over groups of s[g] sum over the group of code x: lanes are added once, at the end. `low` and `high` [bytes] are room for the codes.
static float dot4(const uint8_t* codes, const float* even, const float* odd, const float* s, int64_t bytes, int64_t group_bytes, int8_t* low, int8_t* high) {
#pragma omp simd
    for (int64_t i = 0; i < bytes; i++) {
        low[i] = int8_t(uint8_t((codes[i] & 15) ^ 8) - 8);
        high[i] = int8_t(uint8_t((codes[i] >> 4) ^ 8) - 8);
    }
    float lanes[LANES] = {0}, rest = 0;
    for (int64_t start = 0, g = 0; start < bytes; start += group_bytes, g++) {
        const int64_t end = start + group_bytes < bytes ? start + group_bytes : bytes;
        const float scale = s[g];
        int64_t i = start;
        for (; i + LANES <= end; i += LANES) {
            const int8_t *l = low + i, *h = high + i;
            const float *x = even + i, *y = odd + i;
#pragma omp simd
            for (int j = 0; j < LANES; j++) lanes[j] += scale * (float(l[j]) * x[j] + float(h[j]) * y[j]);
        }
        for (; i < end; i++) rest += scale * (float(low[i]) * even[i] + float(high[i]) * odd[i]);
    }
    for (int j = 0; j < LANES; j++) rest += lanes[j];
    return rest;
}

template <int ROWS> static void dots(const float* w, const float* x, int64_t columns, float* y, int64_t stride) {
    float a = 0, b = 0, c = 0, d = 0;
    const float *x0 = x, *x1 = x + (ROWS > 1 ? columns : 0), *x2 = x + (ROWS > 2 ? 2 * columns : 0), *x3 = x + (ROWS > 3 ? 3 * columns : 0);
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t i = 0; i < columns; i++) {
        a += w[i] * x0[i];
        if (ROWS > 1) b += w[i] * x1[i];
        if (ROWS > 2) c += w[i] * x2[i];
        if (ROWS > 3) d += w[i] * x3[i];
    }
    y[0] = a;
    if (ROWS > 1) y[stride] = b;
    if (ROWS > 2) y[2 * stride] = c;
    if (ROWS > 3) y[3 * stride] = d;
}

// One row of weights as floats, scaled.
static void widen(int kind, const uint8_t* row, const float* s, const int8_t* z, float* out, int64_t columns, int64_t group) {
    for (int64_t start = 0, g = 0; start < columns; start += group, g++) {
        const int64_t end = start + group < columns ? start + group : columns;
        const float scale = s[g], zero = z ? float(z[g]) : 0.0f;
        if (kind == INT8) {
            const int8_t* codes = reinterpret_cast<const int8_t*>(row);
            for (int64_t c = start; c < end; c++) out[c] = (float(codes[c]) - zero) * scale;
        } else if (kind == FP8) {
            for (int64_t c = start; c < end; c++) out[c] = e4m3(row[c]) * scale;
        } else {
            for (int64_t b = start / 2; b < (end + 1) / 2; b++) {
                out[2 * b] = (float(((row[b] & 15) ^ 8) - 8) - zero) * scale;
                out[2 * b + 1] = (float(((row[b] >> 4) ^ 8) - 8) - zero) * scale;  // one past the end where columns are odd
            }
        }
    }
}

// x [rows, columns] float32; data [outs, row_bytes]; scale float32 [outs, groups] (or one number where scale_rows is 0), zero int8 like it or null.
extern "C" void ftc_quantized(const float* x, const uint8_t* data, const float* scale, const int8_t* zero, const float* bias, float* y, const int64_t* sizes,
                              int kind, int threads) {
    const int64_t rows = sizes[0], outs = sizes[1], columns = sizes[2], group = sizes[3], groups = sizes[4], row_bytes = sizes[5], scale_rows = sizes[6];
    std::vector<float> sums(groups), even, odd;  // of the one row of x in each group, by which zero points are multiplied
    if (rows == 1 && zero)
        for (int64_t c = 0; c < columns; c++) sums[c / group] += x[c];
    if (rows == 1 && kind == INT4) {
        even.assign(row_bytes, 0.0f), odd.assign(row_bytes, 0.0f);
        for (int64_t c = 0; c < columns; c++) (c & 1 ? odd : even)[c / 2] = x[c];
    }
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> wide(rows > 1 ? columns + 1 : 0);
        std::vector<int8_t> low(kind == INT4 ? row_bytes : 0), high(kind == INT4 ? row_bytes : 0);
#pragma omp for schedule(static)
        for (int64_t f = 0; f < outs; f++) {
            const uint8_t* row = data + f * row_bytes;
            const float* s = scale + (scale_rows ? f * groups : 0);
            const int8_t* z = zero ? zero + f * groups : nullptr;
            float* out = y + f;
            if (rows > 1) {
                widen(kind, row, s, z, wide.data(), columns, group);
                int64_t m = 0;
                for (; m + 4 <= rows; m += 4) dots<4>(wide.data(), x + m * columns, columns, out + m * outs, outs);
                for (; m + 2 <= rows; m += 2) dots<2>(wide.data(), x + m * columns, columns, out + m * outs, outs);
                for (; m < rows; m++) dots<1>(wide.data(), x + m * columns, columns, out + m * outs, outs);
            } else if (kind == INT4) {
                *out = dot4(row, even.data(), odd.data(), s, row_bytes, (group + 1) / 2, low.data(), high.data());
            } else {
                *out = 0;
                for (int64_t start = 0, g = 0; start < columns; start += group, g++) {
                    const int64_t n = (start + group < columns ? start + group : columns) - start;
                    *out += s[g] * (kind == INT8 ? dot8(reinterpret_cast<const int8_t*>(row) + start, x + start, n) : dot_fp8(row + start, x + start, n));
                }
            }
            if (rows == 1 && z) {
                float taken = 0;
                for (int64_t g = 0; g < groups; g++) taken += float(z[g]) * s[g] * sums[g];
                *out -= taken;
            }
            if (bias)
                for (int64_t m = 0; m < rows; m++) out[m * outs] += bias[f];
        }
    }
}
