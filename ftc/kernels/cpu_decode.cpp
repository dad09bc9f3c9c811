// One decode step of attention over a paged cache on the CPU: every cached number is read from memory once, for all heads.
//
// Legend: B sequences, H heads, G key-value heads, R = H / G rows that share one, D key width, M value width. A latent cache is the
// case G = 1 whose values are the first M of the D columns of the keys. Vectors are 16 floats; the compiler splits them where the
// machine's are shorter.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Bits __attribute__((vector_size(64)));
constexpr int W = 16;           // floats of a vector
constexpr int TILE = 64;        // tokens whose scores are held at a time: their keys and values stay in the second-level cache
constexpr int TOKENS = 8;       // tokens of a register block of scores
constexpr int SHORTEST = 512;   // tokens that are worth a part of their own

static inline Vec load(const float* p) { Vec x; std::memcpy(&x, p, sizeof x); return x; }
static inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
static inline Vec splat(float x) { return Vec{} + x; }
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
static inline int round_up(int n, int to) { return (n + to - 1) / to * to; }
static inline float sum(Vec x) {  // a tree: additions one after another would wait for each other
  x += __builtin_shuffle(x, (Bits){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
  x += __builtin_shuffle(x, (Bits){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
  x += __builtin_shuffle(x, (Bits){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
  return x[0] + x[1];
}

// e^x for x <= 0 to 2e-7 (Cody-Waite reduction, Taylor to degree 6): 2^n from the exponent bits, n rounded by adding 1.5 2^23.
static inline Vec exponential(Vec x) {
  x = larger(x, splat(-87.0f));
  Vec shifted = x * 1.44269504f + 12582912.0f;
  Vec n = shifted - 12582912.0f;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = splat(1.3888889e-3f);
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (Vec)((Bits)p + ((Bits)shifted << 23));
}

// What a page holds: float32, bfloat16, or FP8 latents as ftc/dialect/fp8_latent.py packs them (the values are the latent).
enum Kind : int64_t { FLOAT32, BFLOAT16, PACKED };

struct Job {
  const float* query;  // [B, H, D]
  const char *keys, *values;           // pages with the strides below, in bytes
  const int32_t* table;                // [B, table_stride]
  const int64_t *first, *last;         // [B]: the positions read of each sequence
  float* out;                          // [B, H, M]
  int64_t B, H, G, D, M, block_size, table_stride;
  int64_t k_block, k_row, k_head, v_block, v_row, v_head;
  Kind kind;
  float scale, softcap;  // softcap 0: none
};

// What one part of one sequence leaves: unnormalised sums, the largest score and the sum of exponentials of each score column.
struct Part {
  int64_t b, begin, end;
  std::vector<float> out, highest, total;
};

struct Shape {
  int R, Dp, Mp, Rp, columns;
  bool lanes;  // scores: heads in the lanes of a vector (many share a key), or numbers of a key in the lanes
  explicit Shape(const Job& j) {
    R = j.H / j.G, Dp = round_up(j.D, W), Mp = round_up(j.M, W);
    lanes = R > 4;
    Rp = lanes ? round_up(R, W) : R;
    columns = lanes ? j.G * Rp : round_up(j.H, W);
  }
  int column(int g) const { return g * Rp; }
};

// Scores of TOKENS keys and N vectors of heads: acc[t][v] += key[t][d] * query[d][v].
template <int N>
static void score_lanes(const float* query, const float* const* keys, int D, float scale, float* scores, int columns) {
  Vec acc[TOKENS][N] = {};
  for (int d = 0; d < D; d++) {
    Vec q[N];
    for (int v = 0; v < N; v++) q[v] = load(query + d * N * W + v * W);
    for (int t = 0; t < TOKENS; t++)
      for (int v = 0; v < N; v++) acc[t][v] += q[v] * keys[t][d];
  }
  for (int t = 0; t < TOKENS; t++)
    for (int v = 0; v < N; v++) store(scores + t * columns + v * W, acc[t][v] * scale);
}

// Scores of 4 keys and N heads, products in the lanes.
template <int N>
static void score_dots(const float* query, const float* const* keys, int Dp, float scale, float* scores, int columns) {
  Vec acc[4][N] = {};
  for (int d = 0; d < Dp; d += W) {
    Vec q[N];
    for (int r = 0; r < N; r++) q[r] = load(query + r * Dp + d);
    for (int t = 0; t < 4; t++) {
      Vec k = load(keys[t] + d);
      for (int r = 0; r < N; r++) acc[t][r] += q[r] * k;
    }
  }
  for (int t = 0; t < 4; t++)
    for (int r = 0; r < N; r++) scores[t * columns + r] = sum(acc[t][r]) * scale;
}

// out[r][m] += sum over tokens of weight[t][r] * value[t][m] for N rows and V vectors of m.
template <int N, int V>
static void mix_block(const float* weights, int columns, const float* const* values, int count, float* out, int Mp) {
  Vec acc[N][V];
  for (int r = 0; r < N; r++)
    for (int v = 0; v < V; v++) acc[r][v] = load(out + r * Mp + v * W);
  for (int t = 0; t < count; t++) {
    Vec x[V];
    for (int v = 0; v < V; v++) x[v] = load(values[t] + v * W);
    for (int r = 0; r < N; r++)
      for (int v = 0; v < V; v++) acc[r][v] += x[v] * weights[t * columns + r];
  }
  for (int r = 0; r < N; r++)
    for (int v = 0; v < V; v++) store(out + r * Mp + v * W, acc[r][v]);
}

template <int N, int V>
static void mix_rows(const float* weights, int columns, const float* const* values, int count, float* out, int Mp) {
  const float* at[TILE];
  for (int m = 0; m < Mp;) {
    for (int t = 0; t < count; t++) at[t] = values[t] + m;
    if (m + V * W <= Mp) {
      mix_block<N, V>(weights, columns, at, count, out + m, Mp);
      m += V * W;
    } else {
      mix_block<N, 1>(weights, columns, at, count, out + m, Mp);
      m += W;
    }
  }
}

static void mix(const float* weights, int columns, const float* const* values, int count, float* out, int Mp, int R) {
  int r = 0;
  for (; r + 8 <= R; r += 8) mix_rows<8, 3>(weights + r, columns, values, count, out + r * Mp, Mp);
  for (; r + 4 <= R; r += 4) mix_rows<4, 4>(weights + r, columns, values, count, out + r * Mp, Mp);
  for (; r + 2 <= R; r += 2) mix_rows<2, 4>(weights + r, columns, values, count, out + r * Mp, Mp);
  for (; r < R; r++) mix_rows<1, 4>(weights + r, columns, values, count, out + r * Mp, Mp);
}

// Queries of one sequence as the score kernels read them.
static std::vector<float> arrange(const Job& j, const Shape& s, int64_t b) {
  const float* query = j.query + b * j.H * j.D;
  if (!s.lanes) {
    std::vector<float> rows(j.H * s.Dp, 0.0f);
    for (int h = 0; h < j.H; h++) std::copy_n(query + h * j.D, j.D, rows.data() + h * s.Dp);
    return rows;
  }
  std::vector<float> turned(j.G * j.D * s.Rp, 0.0f);  // per group and pair of vectors: [D, 32], then perhaps [D, 16]
  for (int g = 0; g < j.G; g++)
    for (int r = 0; r < s.R; r++) {
      int pair = r / (2 * W) * 2 * W, lanes = std::min(2 * W, s.Rp - pair);
      float* block = turned.data() + g * j.D * s.Rp + pair * j.D;
      for (int d = 0; d < j.D; d++) block[d * lanes + r - pair] = query[(g * s.R + r) * j.D + d];
    }
  return turned;
}

// Rows of a tile's tokens in their pages.
struct Rows {
  const char *keys[TILE], *values[TILE];
  int count;
};

static void find_rows(const Job& j, int64_t b, int64_t start, int64_t end, Rows& rows) {
  rows.count = std::min<int64_t>(TILE, end - start);
  for (int t = 0; t < TILE; t++) {  // the last tile's rest repeats a row and is not counted
    int64_t position = start + std::min(t, rows.count - 1), block = j.table[b * j.table_stride + position / j.block_size];
    rows.keys[t] = j.keys + block * j.k_block + position % j.block_size * j.k_row;
    rows.values[t] = j.values + block * j.v_block + position % j.block_size * j.v_row;
  }
}

// Reads a tile's rows once, whole and in order, so that the hardware's prefetching sees a stream; the products then find them in the
// second-level cache. Without it, group by group, 16 sequences of 8k tokens in shuffled pages took twice as long; software prefetches
// did not help.
static void fetch(const Job& j, const Rows& rows) {
  int64_t size = j.kind == FLOAT32 ? 4 : j.kind == BFLOAT16 ? 2 : 1, key_bytes = j.D * size;
  if (j.kind == PACKED) key_bytes = j.k_row;
  char seen = 0;
  for (int t = 0; t < rows.count; t++)
    for (int g = 0; g < j.G; g++)
      for (int64_t i = 0; i < key_bytes; i += 64) seen ^= rows.keys[t][g * j.k_head + i];
  for (int t = 0; t < rows.count && j.values != j.keys; t++)
    for (int g = 0; g < j.G; g++)
      for (int64_t i = 0; i < j.M * size; i += 64) seen ^= rows.values[t][g * j.v_head + i];
  asm volatile("" : : "r"(seen));
}

static inline void widen_bfloat16(const char* __restrict row, int n, float* __restrict out) {
  const uint16_t* in = reinterpret_cast<const uint16_t*>(row);
  for (int i = 0; i < n; i++) {
    uint32_t bits = uint32_t(in[i]) << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

// e4m3 to float: the same bits three exponents wider; numbers below 2^-6 have no hidden one, which is taken off again.
static inline void widen_e4m3(const char* __restrict row, int n, float scale, float* __restrict out) {
  const uint8_t* in = reinterpret_cast<const uint8_t*>(row);
  for (int i = 0; i < n; i++) {
    uint32_t magnitude = in[i] & 0x7Fu, small = magnitude < 8u;
    uint32_t bits = (magnitude << 20) + ((120u + small) << 23), sign = (in[i] & 0x80u) << 24;
    float value;
    std::memcpy(&value, &bits, 4);
    value = (value - 0.015625f * float(int32_t(small))) * scale;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
    std::memcpy(out + i, &bits, 4);
  }
}

// `n` numbers of a row as floats at `out`; for packed rows n is L + E, of which the latent is the first `latent`.
static void widen(Kind kind, const char* row, int n, int latent, float* out) {
  if (kind == FLOAT32) std::memcpy(out, row, 4 * n);
  if (kind == BFLOAT16) widen_bfloat16(row, n, out);
  if (kind != PACKED) return;
  for (int at = 0, group = 0; at < latent; at += 128, group++) {
    float scale;
    std::memcpy(&scale, row + latent + 4 * group, 4);
    widen_e4m3(row + at, std::min(128, latent - at), scale, out + at);
  }
  if (n > latent) widen_bfloat16(row + latent + 4 * ((latent + 127) / 128), n - latent, out + latent);
}

static void score_group(const Job& j, const Shape& s, const float* query, const float* const* keys, int count, int g, float* scores) {
  if (s.lanes) {
    for (int t = 0; t < count; t += TOKENS)
      for (int r = 0; r < s.Rp; r += 2 * W) {
        const float* block = query + g * j.D * s.Rp + r * j.D;
        float* at = scores + t * s.columns + s.column(g) + r;
        if (r + 2 * W <= s.Rp) score_lanes<2>(block, keys + t, j.D, j.scale, at, s.columns);
        else score_lanes<1>(block, keys + t, j.D, j.scale, at, s.columns);
      }
    return;
  }
  const float* block = query + g * s.R * s.Dp;
  for (int t = 0; t < count; t += 4) {
    float* at = scores + t * s.columns + s.column(g);
    switch (s.R) {
      case 1: score_dots<1>(block, keys + t, s.Dp, j.scale, at, s.columns); break;
      case 2: score_dots<2>(block, keys + t, s.Dp, j.scale, at, s.columns); break;
      case 3: score_dots<3>(block, keys + t, s.Dp, j.scale, at, s.columns); break;
      default: score_dots<4>(block, keys + t, s.Dp, j.scale, at, s.columns);
    }
  }
}

// Scores to weights e^(score - highest) in place; what was summed before shrinks by e^(old highest - highest).
static void weigh(const Job& j, const Shape& s, Part& part, float* scores, int count, float* shrink) {
  for (int c = 0; c < s.columns; c += W) {
    if (j.softcap > 0)  // softcap tanh(x / softcap) = softcap (1 - 2 / (1 + e^(2 x / softcap))), by the symmetric e^-|x|
      for (int t = 0; t < count; t++) {
        Vec x = load(scores + t * s.columns + c), y = x < 0 ? -x : x;
        Vec e = exponential(y * (-2.0f / j.softcap));
        Vec bounded = (1.0f - e) / (1.0f + e) * j.softcap;
        store(scores + t * s.columns + c, x < 0 ? -bounded : bounded);
      }
    Vec before = load(part.highest.data() + c), now = before;
    for (int t = 0; t < count; t++) now = larger(now, load(scores + t * s.columns + c));
    Vec factor = exponential(before - now), total = load(part.total.data() + c) * factor;
    for (int t = 0; t < count; t++) {
      Vec weight = exponential(load(scores + t * s.columns + c) - now);
      store(scores + t * s.columns + c, weight);
      total += weight;
    }
    store(part.highest.data() + c, now);
    store(part.total.data() + c, total);
    store(shrink + c, factor);
  }
}

static void run_part(const Job& j, const Shape& s, Part& part) {
  std::vector<float> query = arrange(j, s, part.b), scores(TILE * s.columns, 0.0f), shrink(s.columns);
  bool copy_keys = j.kind != FLOAT32 || (!s.lanes && s.Dp != j.D), copy_values = j.kind != FLOAT32 || s.Mp != j.M;
  bool latent = j.keys == j.values && j.G == 1;
  std::vector<float> key_copy(copy_keys ? TILE * s.Dp : 0, 0.0f), value_copy(copy_values ? TILE * s.Mp : 0, 0.0f);
  part.out.assign(j.H * s.Mp, 0.0f), part.total.assign(s.columns, 0.0f), part.highest.assign(s.columns, -1e30f);
  const float *keys[TILE], *values[TILE];
  Rows rows;
  for (int64_t start = part.begin; start < part.end; start += TILE) {
    find_rows(j, part.b, start, part.end, rows);
    fetch(j, rows);
    int count = rows.count;
    for (int g = 0; g < j.G; g++) {
      for (int t = 0; t < TILE; t++) {
        const char* row = rows.keys[t] + g * j.k_head;
        keys[t] = copy_keys ? key_copy.data() + t * s.Dp : reinterpret_cast<const float*>(row);
        if (copy_keys && t < count) widen(j.kind, row, j.D, j.M, key_copy.data() + t * s.Dp);
      }
      score_group(j, s, query.data(), keys, count, g, scores.data());
    }
    weigh(j, s, part, scores.data(), count, shrink.data());
    for (int g = 0; g < j.G; g++) {
      float* out = part.out.data() + g * s.R * s.Mp;
      for (int t = 0; t < count; t++) {
        const char* row = rows.values[t] + g * j.v_head;
        values[t] = copy_values ? value_copy.data() + t * s.Mp : reinterpret_cast<const float*>(row);
        if (latent && copy_keys) values[t] = key_copy.data() + t * s.Dp;  // widened already; what follows the latent is not used
        else if (copy_values) widen(j.kind, row, j.M, j.M, value_copy.data() + t * s.Mp);
      }
      for (int r = 0; r < s.R; r++)
        for (int m = 0; m < s.Mp; m++) out[r * s.Mp + m] *= shrink[s.column(g) + r];
      mix(scores.data() + s.column(g), s.columns, values, count, out, s.Mp, s.R);
    }
  }
}

// The parts of sequence b, weighted by e^(highest - the largest highest), over their common sum; a sequence without parts gives zeros.
static void merge(const Job& j, const Shape& s, const std::vector<Part>& parts, int64_t b) {
  for (int h = 0; h < j.H; h++) {
    int column = s.column(h / s.R) + h % s.R;
    float* out = j.out + (b * j.H + h) * j.M;
    std::fill_n(out, j.M, 0.0f);
    float highest = -1e30f, total = 0;
    for (const Part& p : parts)
      if (p.b == b) highest = std::max(highest, p.highest[column]);
    for (const Part& p : parts) {
      if (p.b != b) continue;
      float weight = std::exp(p.highest[column] - highest);
      total += weight * p.total[column];
      for (int m = 0; m < j.M; m++) out[m] += weight * p.out[h * s.Mp + m];
    }
    for (int m = 0; m < j.M && total > 0; m++) out[m] /= total;
  }
}

extern "C" void ftc_decode(
    const float* query, const char* keys, const char* values, const int32_t* table, const int64_t* first, const int64_t* last, float* out,
    const int64_t* sizes, const int64_t* strides, float scale, float softcap, int threads) {
  Job j{query, keys, values, table, first, last, out, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
        strides[0], strides[1], strides[2], strides[3], strides[4], strides[5], Kind(sizes[7]), scale, softcap};
  Shape s(j);
  int64_t tokens = 0;
  for (int64_t b = 0; b < j.B; b++) tokens += last[b] - first[b];
  int64_t share = std::max<int64_t>(SHORTEST, round_up(tokens / (4 * threads) + 1, TILE));
  std::vector<Part> parts;
  for (int64_t b = 0; b < j.B; b++)
    for (int64_t begin = first[b]; begin < last[b]; begin += share) parts.push_back({b, begin, std::min(begin + share, last[b]), {}, {}, {}});
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (size_t i = 0; i < parts.size(); i++) run_part(j, s, parts[i]);
  for (int64_t b = 0; b < j.B; b++) merge(j, s, parts, b);
}
