// A mixture of experts on the CPU, forward and backward: rows sorted by expert, each expert's chain of products in the cache of one thread.
//
// Legend: N tokens, K experts a token, D model, E experts, F middle width, R rows of one expert; a slot is n * K + j. The definition and
// its arguments are in ftc/dialect/moe.py.

#include <cmath>

#include "cpu_product.h"

enum Activation : int64_t { SILU, GELU, GELU_TANH, RELU, SIGMOID, RELU2, IDENTITY, CLAMPED_SWISH };

template <class T> struct Job {
  const T *x, *weights, *gate_up, *down, *gate_up_bias, *down_bias;  // biases may be null
  const int64_t* indices;
  int64_t N, D, E, K, F;
  bool gated, weight_on_input;
  Activation activation;
  T alpha, limit;
  int threads;
  int64_t wide() const { return gated ? 2 * F : F; }
};

// e^x to 2e-7 (Cody-Waite reduction, Taylor to degree 6); double takes the library's.
static inline double exponential(double x) { return std::exp(x); }
static inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333333e-3f, p = p * r + 4.1666667e-2f, p = p * r + 1.6666667e-1f, p = p * r + 0.5f, p = p * r + 1.0f, p = p * r + 1.0f;
  int32_t bits, scale;
  std::memcpy(&bits, &p, 4), std::memcpy(&scale, &shifted, 4);
  bits += scale << 23;
  std::memcpy(&p, &bits, 4);
  return p;
}

template <class T> static inline T sigmoid(T x) { return T(1) / (T(1) + exponential(-x)); }

// The normal distribution function and its density. float: Abramowitz and Stegun 7.1.26, to 1.5e-7.
static inline void normal(double x, double& below, double& density) {
  below = 0.5 * std::erfc(-x * 0.70710678118654752440), density = 0.39894228040143267794 * std::exp(-0.5 * x * x);
}
static inline void normal(float x, float& below, float& density) {
  float bell = exponential(-0.5f * x * x), t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * std::fabs(x));
  float p = 1.061405429f;
  p = p * t - 1.453152027f, p = p * t + 1.421413741f, p = p * t - 0.284496736f, p = p * t + 0.254829592f;
  float tail = 0.5f * p * t * bell;
  below = x < 0 ? tail : 1.0f - tail, density = 0.39894228f * bell;
}

// act(g) and its derivative.
template <Activation A, class T> static inline void act(T g, T& value, T& slope) {
  if constexpr (A == SILU) {
    T s = sigmoid(g);
    value = g * s, slope = s * (T(1) + g * (T(1) - s));
  } else if constexpr (A == GELU) {
    T below, density;
    normal(g, below, density);
    value = g * below, slope = below + g * density;
  } else if constexpr (A == GELU_TANH) {  // (1 + tanh(y)) / 2 = sigmoid(2 y)
    T s = sigmoid(T(1.5957691216057307) * g * (T(1) + T(0.044715) * g * g));
    value = g * s, slope = s + g * s * (T(1) - s) * T(1.5957691216057307) * (T(1) + T(3 * 0.044715) * g * g);
  } else if constexpr (A == RELU) {
    value = g > 0 ? g : T(0), slope = g > 0 ? T(1) : T(0);
  } else if constexpr (A == SIGMOID) {
    value = sigmoid(g), slope = value * (T(1) - value);
  } else if constexpr (A == RELU2) {
    T r = g > 0 ? g : T(0);
    value = r * r, slope = 2 * r;
  } else {
    value = g, slope = T(1);
  }
}

// middle = act(g) u and its derivatives by g and u, for one number.
template <Activation A, bool GATED, class T> static inline T middle(const Job<T>& job, T g, T u, T& by_gate, T& by_up) {
  if constexpr (A == CLAMPED_SWISH) {
    T gate = std::min(g, job.limit), up = std::min(std::max(u, -job.limit), job.limit), s = sigmoid(job.alpha * gate), swish = gate * s;
    by_gate = g <= job.limit ? s * (T(1) + job.alpha * gate * (T(1) - s)) * (up + T(1)) : T(0);
    by_up = u >= -job.limit && u <= job.limit ? swish : T(0);
    return swish * (up + T(1));
  } else {
    T value, slope;
    act<A>(g, value, slope);
    by_gate = GATED ? slope * u : slope, by_up = value;
    return GATED ? value * u : value;
  }
}

template <Activation A, bool GATED, class T> static void forward_row(const Job<T>& job, const T* gate, const T* up, int64_t count, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    T by_gate, by_up;
    out[i] = middle<A, GATED>(job, gate[i], GATED ? up[i] : T(1), by_gate, by_up);
  }
}

// gate_up becomes its own gradient, the gradient of the (unweighted) middle becomes the weighted middle; returns their product.
template <Activation A, bool GATED, class T> static T backward_row(const Job<T>& job, T weight, T* gate_up, T* grad) {
  T dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < job.F; i++) {
    T by_gate, by_up, d = grad[i];
    T value = middle<A, GATED>(job, gate_up[i], GATED ? gate_up[job.F + i] : T(1), by_gate, by_up);
    dot += d * value;
    gate_up[i] = weight * d * by_gate;
    if (GATED) gate_up[job.F + i] = weight * d * by_up;
    grad[i] = weight * value;
  }
  return dot;
}

template <class T> struct Rows {
  void (*forward)(const Job<T>&, const T* gate, const T* up, int64_t count, T* out);
  T (*backward)(const Job<T>&, T, T*, T*);
};
template <class T, Activation A> static Rows<T> rows_of(bool gated) {
  if (gated) return {forward_row<A, true, T>, backward_row<A, true, T>};
  return {forward_row<A, false, T>, backward_row<A, false, T>};
}
template <class T> static Rows<T> rows_of(const Job<T>& job) {
  switch (job.activation) {
    case SILU: return rows_of<T, SILU>(job.gated);
    case GELU: return rows_of<T, GELU>(job.gated);
    case GELU_TANH: return rows_of<T, GELU_TANH>(job.gated);
    case RELU: return rows_of<T, RELU>(job.gated);
    case SIGMOID: return rows_of<T, SIGMOID>(job.gated);
    case RELU2: return rows_of<T, RELU2>(job.gated);
    case IDENTITY: return rows_of<T, IDENTITY>(job.gated);
    default: return rows_of<T, CLAMPED_SWISH>(true);
  }
}

// Slots in the order of their experts; a slot whose index names no expert stands nowhere.
struct Order {
  std::vector<int64_t> slots, place, first, experts;  // place[slot] in `slots` or -1; rows of e: first[e] .. first[e + 1]; largest expert first
  Order(const int64_t* indices, int64_t count, int64_t E) : place(count, -1), first(E + 1, 0), experts(E) {
    auto there = [&](int64_t slot) { return indices[slot] >= 0 && indices[slot] < E; };
    for (int64_t s = 0; s < count; s++) if (there(s)) first[indices[s] + 1]++;
    for (int64_t e = 0; e < E; e++) first[e + 1] += first[e], experts[e] = e;
    slots.resize(first[E]);
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t s = 0; s < count; s++) if (there(s)) slots[place[s] = next[indices[s]]++] = s;
    std::stable_sort(experts.begin(), experts.end(), [&](int64_t a, int64_t b) { return rows(a) > rows(b); });
  }
  int64_t rows(int64_t e) const { return first[e + 1] - first[e]; }
};

// Memory of one thread for one expert's rows; strides are padded so that rows do not fall into one set of the first-level cache.
template <class T> struct Scratch {
  std::unique_ptr<T[]> memory;
  size_t size = 0;
  T* take(size_t count) {
    if (count > size) memory.reset(new T[size = count]);
    return memory.get();
  }
};
template <class T> static int64_t padded(int64_t n) { return (n + LANES<T> - 1) / LANES<T> * LANES<T> + LANES<T>; }

// visit(expert, scratch): an expert with more than half a thread's share of the rows by all threads, the others one a thread.
template <class T, class Visit> static void each_expert(const Job<T>& job, const Order& order, Visit visit) {
  size_t i = 0;
  if (job.threads > 1) {
    Scratch<T> scratch;
    for (; i < order.experts.size() && 2 * order.rows(order.experts[i]) * job.threads > int64_t(order.slots.size()); i++)
      if (order.rows(order.experts[i])) visit(order.experts[i], scratch);
  }
#pragma omp parallel num_threads(job.threads) if (job.threads > 1)
  {
    Scratch<T> scratch;
#pragma omp for schedule(dynamic, 1)
    for (size_t k = i; k < order.experts.size(); k++) visit(order.experts[k], scratch);
  }
}

template <class T> static void gather(const Job<T>& job, const T* from, const int64_t* slots, int64_t R, bool weigh, T* to, int64_t stride) {
#pragma omp parallel for if (!omp_in_parallel())
  for (int64_t r = 0; r < R; r++) {
    const T *row = from + slots[r] / job.K * job.D, weight = weigh ? job.weights[slots[r]] : T(1);
    for (int64_t d = 0; d < job.D; d++) to[r * stride + d] = row[d] * weight;
  }
}

// out[n] = sum over j of its rows, weighed where asked.
template <class T> static void combine(const Job<T>& job, const Order& order, const T* rows, bool weigh, T* out) {
#pragma omp parallel for num_threads(job.threads) if (job.threads > 1 && job.N > 64)
  for (int64_t n = 0; n < job.N; n++) {
    std::fill_n(out + n * job.D, job.D, T(0));
    for (int64_t slot = n * job.K; slot < (n + 1) * job.K; slot++) {
      if (order.place[slot] < 0) continue;
      const T *row = rows + order.place[slot] * job.D, weight = weigh ? job.weights[slot] : T(1);
      for (int64_t d = 0; d < job.D; d++) out[n * job.D + d] += row[d] * weight;
    }
  }
}

template <class T> static void forward(const Job<T>& job, T* out) {
  Order order(job.indices, job.N * job.K, job.E);
  std::unique_ptr<T[]> results(new T[order.slots.size() * job.D]);
  int64_t D = job.D, F = job.F, wide = job.wide(), sx = padded<T>(D), sg = padded<T>(wide), sm = padded<T>(F);
  Rows<T> rows = rows_of(job);
  each_expert(job, order, [&](int64_t e, Scratch<T>& scratch) {
    int64_t R = order.rows(e);
    if (!R) return;
    T *x = scratch.take(R * (sx + sg + sm)), *gate_up = x + R * sx, *mid = gate_up + R * sg;
    gather(job, job.x, order.slots.data() + order.first[e], R, job.weight_on_input, x, sx);
    product<T, false, true>(R, wide, D, {x, sx}, {job.gate_up + e * wide * D, D}, gate_up, sg, job.gate_up_bias ? job.gate_up_bias + e * wide : nullptr);
#pragma omp parallel for if (!omp_in_parallel())
    for (int64_t r = 0; r < R; r++) rows.forward(job, gate_up + r * sg, gate_up + r * sg + F, F, mid + r * sm);
    product<T, false, true>(R, D, F, {mid, sm}, {job.down + e * D * F, F}, results.get() + order.first[e] * D, D, job.down_bias ? job.down_bias + e * D : nullptr);
  });
  combine(job, order, results.get(), !job.weight_on_input, out);
}

template <class T> static void sum_rows(const T* rows, int64_t R, int64_t stride, int64_t count, T* out) {
  std::fill_n(out, count, T(0));
  for (int64_t r = 0; r < R; r++)
    for (int64_t i = 0; i < count; i++) out[i] += rows[r * stride + i];
}

template <class T> static T dot(const T* a, const T* b, int64_t count) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
  return sum;
}

// Gradients, each where its pointer is not null. The first product of the forward is made again (see cpu_moe.py).
template <class T> struct Gradients { T *x, *weights, *gate_up, *down, *gate_up_bias, *down_bias; };

// Of one expert with R rows: `grad_x` its rows of the gradient of x.
template <class T>
static void backward_expert(const Job<T>& job, const Rows<T>& rows, const int64_t* slots, int64_t R, int64_t e, const T* grad, T* grad_x, const Gradients<T>& to, Scratch<T>& scratch) {
  int64_t D = job.D, F = job.F, wide = job.wide(), sx = padded<T>(D), sg = padded<T>(wide), sm = padded<T>(F);
  const T *W1 = job.gate_up + e * wide * D, *W2 = job.down + e * D * F;
  T *x = scratch.take(R * (2 * sx + sg + sm)), *g = x + R * sx, *gate_up = g + R * sx, *mid = gate_up + R * sg;
  gather(job, job.x, slots, R, job.weight_on_input, x, sx);
  gather(job, grad, slots, R, false, g, sx);
  product<T, false, true>(R, wide, D, {x, sx}, {W1, D}, gate_up, sg, job.gate_up_bias ? job.gate_up_bias + e * wide : nullptr);
  product<T, false, false>(R, F, D, {g, sx}, {W2, F}, mid, sm);
#pragma omp parallel for if (!omp_in_parallel())
  for (int64_t r = 0; r < R; r++) {  // d loss / d w = <W_down^T grad, middle> + <grad, b_down>: no expert's result is needed
    T by_weight = rows.backward(job, job.weight_on_input ? T(1) : job.weights[slots[r]], gate_up + r * sg, mid + r * sm);
    if (to.weights && !job.weight_on_input) to.weights[slots[r]] = by_weight + (job.down_bias ? dot(g + r * sx, job.down_bias + e * D, D) : T(0));
  }
  if (to.down) product<T, true, false>(D, F, R, {g, sx}, {mid, sm}, to.down + e * D * F, F);
  if (to.gate_up) product<T, true, false>(wide, D, R, {gate_up, sg}, {x, sx}, to.gate_up + e * wide * D, D);
  if (to.gate_up_bias) sum_rows(gate_up, R, sg, wide, to.gate_up_bias + e * wide);
  if (to.down_bias) {
    gather(job, grad, slots, R, !job.weight_on_input, g, sx);
    sum_rows(g, R, sx, D, to.down_bias + e * D);
  }
  if (!grad_x) return;
  product<T, false, false>(R, D, wide, {gate_up, sg}, {W1, D}, grad_x, D);
  if (!job.weight_on_input) return;
#pragma omp parallel for if (!omp_in_parallel())
  for (int64_t r = 0; r < R; r++) {
    if (to.weights) to.weights[slots[r]] = dot(grad_x + r * D, job.x + slots[r] / job.K * D, D);
    for (int64_t d = 0; d < D; d++) grad_x[r * D + d] *= job.weights[slots[r]];
  }
}

template <class T> static void backward(const Job<T>& job, const T* grad, const Gradients<T>& to) {
  Order order(job.indices, job.N * job.K, job.E);
  int64_t D = job.D, F = job.F, wide = job.wide();
  bool want_rows = to.x || (to.weights && job.weight_on_input);
  std::unique_ptr<T[]> grad_rows(want_rows ? new T[order.slots.size() * D] : nullptr);
  Rows<T> rows = rows_of(job);
  if (to.weights) std::fill_n(to.weights, job.N * job.K, T(0));
  each_expert(job, order, [&](int64_t e, Scratch<T>& scratch) {
    if (int64_t R = order.rows(e)) {
      T* grad_x = want_rows ? grad_rows.get() + order.first[e] * D : nullptr;
      return backward_expert(job, rows, order.slots.data() + order.first[e], R, e, grad, grad_x, to, scratch);
    }
    if (to.gate_up) std::fill_n(to.gate_up + e * wide * D, wide * D, T(0));
    if (to.down) std::fill_n(to.down + e * D * F, D * F, T(0));
    if (to.gate_up_bias) std::fill_n(to.gate_up_bias + e * wide, wide, T(0));
    if (to.down_bias) std::fill_n(to.down_bias + e * D, D, T(0));
  });
  if (to.x) combine(job, order, grad_rows.get(), false, to.x);
}

// Few tokens: nothing is packed; every number of the experts that were hit is read once, in place, and multiplied with all their rows.
constexpr int OUTPUTS = 32;  // outputs of one piece of work

template <class T> static inline Vec<T> widened(const T* p) { return load(p); }
template <class T> static inline Vec<T> widened(const uint16_t* p) {  // bfloat16: the upper half of a float
  typedef uint16_t Halves __attribute__((vector_size(BYTES / 2)));
  typedef uint32_t Words __attribute__((vector_size(BYTES)));
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Vec<T>)(__builtin_convertvector(h, Words) << 16);
}
static inline float wide_number(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
static inline float wide_number(float x) { return x; }
static inline double wide_number(double x) { return x; }
static inline float narrow(float x, float) { return x; }
static inline double narrow(double x, double) { return x; }
static inline uint16_t narrow(float x, uint16_t) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::isnan(x) ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// out[r][o] = <matrix[o], rows[r]> for R rows and 4 outputs.
template <class T, class S, int R> static void dots(const S* matrix, int64_t depth, const T* const* rows, T (*out)[OUTPUTS]) {
  Vec<T> sums[4][R] = {};
  int64_t k = 0;
  for (; k + LANES<T> <= depth; k += LANES<T>) {
    Vec<T> x[R];
    for (int r = 0; r < R; r++) x[r] = load(rows[r] + k);
    for (int o = 0; o < 4; o++) {
      Vec<T> m = widened<T>(matrix + o * depth + k);
      for (int r = 0; r < R; r++) sums[o][r] += m * x[r];
    }
  }
  for (int o = 0; o < 4; o++)
    for (int r = 0; r < R; r++) {
      T sum = 0;
      for (int i = 0; i < LANES<T>; i++) sum += sums[o][r][i];
      for (int64_t i = k; i < depth; i++) sum += T(wide_number(matrix[o * depth + i])) * rows[r][i];
      out[r][o] = sum;
    }
}

// `count` outputs of up to 4 rows, plus the bias.
template <class T, class S> static void outputs(const S* matrix, const S* bias, int64_t depth, const T* const* rows, int R, int count, T (*out)[OUTPUTS]) {
  int o = 0;
  for (; o + 4 <= count; o += 4) {
    T(*at)[OUTPUTS] = reinterpret_cast<T(*)[OUTPUTS]>(&out[0][o]);
    if (R == 1) dots<T, S, 1>(matrix + o * depth, depth, rows, at);
    else if (R == 2) dots<T, S, 2>(matrix + o * depth, depth, rows, at);
    else if (R == 3) dots<T, S, 3>(matrix + o * depth, depth, rows, at);
    else dots<T, S, 4>(matrix + o * depth, depth, rows, at);
  }
  for (; o < count; o++)
    for (int r = 0; r < R; r++) {
      out[r][o] = 0;
      for (int64_t i = 0; i < depth; i++) out[r][o] += T(wide_number(matrix[o * depth + i])) * rows[r][i];
    }
  for (int r = 0; r < R && bias; r++)
    for (o = 0; o < count; o++) out[r][o] += T(wide_number(bias[o]));
}

// S: what x, experts and the result are stored in; the routing weights are in T, which sums are made in.
template <class T, class S> struct Few { const S *x, *gate_up, *down, *gate_up_bias, *down_bias; S* out; };

template <class T, class S> static void few(const Job<T>& job, const Few<T, S>& stored) {
  Order order(job.indices, job.N * job.K, job.E);
  const int64_t D = job.D, F = job.F, wide = job.wide(), total = order.slots.size();
  int64_t hit = 0;
  while (hit < job.E && order.rows(order.experts[hit])) hit++;
  std::vector<T> x(total * D), mid(total * F), results(total * D);
  Rows<T> rows = rows_of(job);
  for (int64_t s = 0; s < total; s++) {
    const S* row = stored.x + order.slots[s] / job.K * D;
    T weight = job.weight_on_input ? job.weights[order.slots[s]] : T(1);
    for (int64_t d = 0; d < D; d++) x[s * D + d] = T(wide_number(row[d])) * weight;
  }
  // piece(expert, first output, outputs, first row, rows) over all outputs of the experts that were hit
  auto each = [&](int64_t width, auto piece) {
    int64_t pieces = (width + OUTPUTS - 1) / OUTPUTS;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < hit * pieces; i++) {
      int64_t e = order.experts[i / pieces], first = i % pieces * OUTPUTS;
      for (int64_t s = order.first[e]; s < order.first[e + 1]; s += 4)
        piece(e, first, int(std::min<int64_t>(OUTPUTS, width - first)), s, int(std::min<int64_t>(4, order.first[e + 1] - s)));
    }
  };
#pragma omp parallel num_threads(job.threads) if (job.threads > 1)
  {
    each(F, [&](int64_t e, int64_t f, int count, int64_t s, int R) {
      T gate[4][OUTPUTS], up[4][OUTPUTS];
      const T* at[4];
      for (int r = 0; r < R; r++) at[r] = x.data() + (s + r) * D;
      const S *matrix = stored.gate_up + e * wide * D, *bias = stored.gate_up_bias ? stored.gate_up_bias + e * wide : nullptr;
      outputs(matrix + f * D, bias ? bias + f : nullptr, D, at, R, count, gate);
      if (job.gated) outputs(matrix + (F + f) * D, bias ? bias + F + f : nullptr, D, at, R, count, up);
      for (int r = 0; r < R; r++) rows.forward(job, gate[r], up[r], count, mid.data() + (s + r) * F + f);
    });
    each(D, [&](int64_t e, int64_t d, int count, int64_t s, int R) {
      T out[4][OUTPUTS];
      const T* at[4];
      for (int r = 0; r < R; r++) at[r] = mid.data() + (s + r) * F;
      outputs(stored.down + (e * D + d) * F, stored.down_bias ? stored.down_bias + e * D + d : nullptr, F, at, R, count, out);
      for (int r = 0; r < R; r++) std::copy_n(out[r], count, results.data() + (s + r) * D + d);
    });
  }
  std::vector<T> sums(job.N * D);
  combine(job, order, results.data(), !job.weight_on_input, sums.data());
  for (int64_t i = 0; i < job.N * D; i++) stored.out[i] = narrow(sums[i], S());
}

// inputs: x, weights, gate_up, down, gate_up_bias, down_bias; sizes: N, D, E, K, F, gated, weight_on_input, activation, threads.
template <class T> static Job<T> make_job(void* const* inputs, const int64_t* indices, const int64_t* sizes, const double* constants) {
  auto input = [&](int i) { return static_cast<const T*>(inputs[i]); };
  return {input(0), input(1), input(2), input(3), input(4), input(5), indices, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5] != 0,
          sizes[6] != 0, Activation(sizes[7]), T(constants[0]), T(constants[1]), int(sizes[8])};
}
template <class T> static Gradients<T> make_gradients(void* const* to) {
  auto output = [&](int i) { return static_cast<T*>(to[i]); };
  return {output(0), output(1), output(2), output(3), output(4), output(5)};
}

extern "C" void ftc_moe_forward(void* const* inputs, const int64_t* indices, const int64_t* sizes, const double* constants, void* out, int wide) {
  if (wide) forward(make_job<double>(inputs, indices, sizes, constants), static_cast<double*>(out));
  else forward(make_job<float>(inputs, indices, sizes, constants), static_cast<float*>(out));
}
extern "C" void ftc_moe_backward(void* const* inputs, const int64_t* indices, const int64_t* sizes, const double* constants, const void* grad, void* const* to, int wide) {
  if (wide) backward(make_job<double>(inputs, indices, sizes, constants), static_cast<const double*>(grad), make_gradients<double>(to));
  else backward(make_job<float>(inputs, indices, sizes, constants), static_cast<const float*>(grad), make_gradients<float>(to));
}

// kind: 0 float32, 1 float64, 2 bfloat16 (its routing weights are float32).
template <class T, class S> static void run_few(void* const* inputs, const int64_t* indices, const int64_t* sizes, const double* constants, void* out) {
  auto input = [&](int i) { return static_cast<const S*>(inputs[i]); };
  few<T, S>(make_job<T>(inputs, indices, sizes, constants), {input(0), input(2), input(3), input(4), input(5), static_cast<S*>(out)});
}
extern "C" void ftc_moe_few(void* const* inputs, const int64_t* indices, const int64_t* sizes, const double* constants, void* out, int kind) {
  if (kind == 0) run_few<float, float>(inputs, indices, sizes, constants, out);
  if (kind == 1) run_few<double, double>(inputs, indices, sizes, constants, out);
  if (kind == 2) run_few<float, uint16_t>(inputs, indices, sizes, constants, out);
}
