// The backward pass of every neuron with linear charge, thresholds and a reset: a linear scan in reverse,
//
//   for k, i:  c = 0                                                        (dL/dh of the step after, times decay)
//     for t from the last to the first:
//              spike = f >= fire_at[k],  d = surrogate'(f - threshold[k])
//              dv/df = (spike ? 1 - hard : 1) + (detach_reset ? 0 : d (hard (v_rest - f) - (1 - hard) threshold[k]))
//              g = grad_spikes[t, i] d + c dv/df                            (dL/df)
//              g = rectified ? (scale h > 0 ? scale g : 0) : g              (dL/dh)
//              grad_u[t, i] += gain g,  c = decay g
//
// with f and h as in the forward pass. They are computed again from x, a chunk of steps at a time, in cache.
#include "neurons/scan.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

constexpr int64_t FIRST_CACHE = 32 << 10, SECOND_CACHE = 320 << 10;  // bytes of a block's rows

// What one block needs, as rows of `block` floats. Row r + 1 of a level's `f` is f of the chunk's step r, row 0 the
// potential with which the chunk begins; `h` likewise where that differs. Rows lie a cache line more than a block
// apart: at whole pages, what is stored in one would hold up loads from the next.
struct BackwardRows {
  int64_t block, stride, chunk, count = 0;
  float *f, *h, *carried, *total, *slope, *pass, *pass_x, *over_steps, *currents;

  BackwardRows(const ScanBackward& a, int64_t K, float* rows, int64_t block)
      : block(block), stride(spaced(block)), chunk(a.chunk) {
    const auto take = [&](bool wanted, int64_t n) {
      float* first = rows == nullptr ? nullptr : rows + (wanted ? count * stride : 0);  // null: only counted
      count += wanted ? n : 0;
      return first;
    };
    f = take(true, K * (chunk + 1));
    h = take(a.rectified, chunk + 1);
    carried = take(true, K);
    total = take(true, a.levels > K ? a.steps : 1);
    slope = take(true, K);
    pass = take(true, 1), pass_x = take(true, 1);
    over_steps = take(true, 1);
    currents = take(a.factor != nullptr, CURRENT_ROWS);
  }
  static int64_t spaced(int64_t block) { return block + 16; }
  float* potential(int level, int64_t row) const { return f + (level * (chunk + 1) + row) * stride; }
};

// --- potentials, again
// ------------------------------------------------------------------------------------------------

// Step r of a chunk on n elements, of levels from `level` on.
template <class T>
struct ChargeStep {
  int64_t level, r, n;
  Current<T> u;
  const BackwardRows& rows;
  const PrefetchList<T>& prefetch;
};

template <class T>
using Charge = void (*)(const Scan&, const ChargeStep<T>&);

// The potentials of K levels, those of the chunk's step r into row r + 1.
template <class T, int K, Reset reset, bool rectified, Source source>
__attribute__((noinline)) void charge(const Scan& a, const ChargeStep<T>& at) {
  const Vec decay = all(a.decay), gain = all(a.gain), scale = all(a.scale), rest = all(a.v_rest);
  Vec threshold[K], last_fire_at[K];
  float* f[K];
  const float* last[K];
  each_level<K>([&](int j) {
    threshold[j] = all(a.threshold[at.level + j]);
    // The potential of a beginning is not reset, however high: an infinite threshold for it.
    last_fire_at[j] = all(at.r == 0 ? __builtin_inff() : a.fire_at[at.level + j]);
    last[j] = at.rows.potential(j, at.r), f[j] = at.rows.potential(j, at.r + 1);
  });
  float* before = at.rows.h + (at.r + 1) * at.rows.stride;
  const Current<T> u = at.u;
  each_vector(at.n, at.prefetch, [=](int64_t i, auto lanes) ALWAYS_INLINE {
    const Vec current = gain * u.template get<source>(i, lanes);
    each_level<K>([&](int j) ALWAYS_INLINE {
      const Vec f_last = lanes.get(last[j] + i);
      const Vec v = after<reset>(at_least(f_last, last_fire_at[j]), f_last, threshold[j], rest);
      const Vec h = charged<reset>(v, decay, current, rest);
      if constexpr (rectified) {
        lanes.put(before + i, h);
        lanes.put(f[j] + i, select(below(Vec{}, scale * h), scale * h, Vec{}));
      } else {
        lanes.put(f[j] + i, h);
      }
    });
  });
}

template <class T, int K, Reset reset, bool rectified>
Charge<T> charge_of(Source source) {
  if constexpr (K == 1 && !std::is_same_v<T, float>)  // several levels at a time read their currents once
    if (source == Source::row) return charge<T, K, reset, rectified, Source::row>;
  if (source == Source::normed) return charge<T, K, reset, rectified, Source::normed>;
  if (source == Source::normed_residual) return charge<T, K, reset, rectified, Source::normed_residual>;
  return charge<T, K, reset, rectified, Source::input>;
}

template <class T>
Charge<T> charge_of(const Scan& a, int levels_at_once, Source source) {
  const bool three = levels_at_once == 3;
  if (a.rectified)
    return a.hard ? charge_of<T, 1, Reset::hard, true>(source) : charge_of<T, 1, Reset::soft, true>(source);
  if (!a.hard) return three ? charge_of<T, 3, Reset::soft, false>(source) : charge_of<T, 1, Reset::soft, false>(source);
  if (a.v_rest != 0.f)
    return three ? charge_of<T, 3, Reset::hard, false>(source) : charge_of<T, 1, Reset::hard, false>(source);
  return three ? charge_of<T, 3, Reset::zero, false>(source) : charge_of<T, 1, Reset::zero, false>(source);
}

// --- one step back
// ----------------------------------------------------------------------------------------------------

// dS/dF of one level and step: given, or of a surrogate that `back` does not compute itself, in a row.
const float* slope_row(const ScanBackward& a, int64_t level, int64_t t, int64_t i0, int64_t n, const float* f,
                       float* row) {
  if (a.surrogate == Surrogate::slope) return a.slope + (level * a.steps + t) * a.size + i0;
  const float threshold = a.threshold[level];
#pragma omp simd
  for (int64_t i = 0; i < n; i++) row[i] = f[i] - threshold;
  derivative_row(a.surrogate, n, row, a.p, a.q, row);
  return row;
}

template <Surrogate kind>
ALWAYS_INLINE inline Vec derivative(Vec u, Vec p, Vec q) {
  static_assert(kind == Surrogate::rational || kind == Surrogate::rectangle);
  if constexpr (kind == Surrogate::rectangle) return select(below(absolute(u), q), p, Vec{});
  const Vec w = q * u;
  return p / fused(w, w, all(1.f));
}

// Sums over a block, for the constants of the charge.
struct ConstantSums {
  double decay = 0, gain = 0, scale = 0;
};

// How the gradient of a potential passes the reset behind it: as the settings say, or, with less arithmetic, a reset to
// 0 and one that is no part of the gradient, where spikes cut what came from later and nothing else.
enum class Through { any, zero, cut };

// Step t, number r of its chunk, of n elements from i0 on, of levels from `level` on.
template <class T>
struct BackStep {
  int64_t level, t, r, i0, n;
  const T* x;
  const float* row;      // the currents as a row of floats, or null: they are x
  T* out;                // takes grad_u,
  float* total;          // or, where not null, this row of sums does
  float *pass, *pass_x;  // rows of sums of grad_u and grad_u x, or null
  const BackwardRows& rows;
  const PrefetchList<T>& prefetch;
  ConstantSums& sums;
};

template <class T>
using Back = void (*)(const ScanBackward&, const BackStep<T>&);

// `carried` holds dL/dh of the step after (behind the last step dL/dV, which no decay has passed) and then of this one.
// The decay's gradient belongs to the step after, whose charge begins with the potential that is known here.
// `summed` says whether gradients of all steps are added up: 0, 1, or -1 as memory for them is there. With several
// levels at a time the branch costs up to a third.
template <class T, Surrogate kind, bool rectified, bool learn, Through through, int K, int summed = -1>
__attribute__((noinline)) void back(const ScanBackward& a, const BackStep<T>& at) {
  static_assert(K == 1 || !(rectified || learn));
  const bool ends = at.t == a.steps - 1;
  const Vec decay = all(ends ? 1.f : a.decay), gain = all(a.gain), scale = all(a.scale), rest = all(a.v_rest);
  const Vec p = all(a.p), q = all(a.q);
  const float hard = through != Through::any || a.hard ? 1.f : 0.f, attached = a.detach_reset ? 0.f : 1.f;
  // d(potential after the reset) / d(spike) is attached (hard (rest - f) - (1 - hard) threshold) = slope f + offset.
  const Vec reset_slope = all(-attached * hard), kept = all(1.f - hard);
  Vec threshold[K], fire_at[K], reset_offset[K];
  float* carried[K];
  const float *slope[K], *f[K];
  each_level<K>([&](int j) {
    const float level_threshold = a.threshold[at.level + j];
    threshold[j] = all(level_threshold), fire_at[j] = all(a.fire_at[at.level + j]);
    reset_offset[j] = all(attached * (hard * a.v_rest - (1.f - hard) * level_threshold));
    carried[j] = at.rows.carried + j * at.rows.block, f[j] = at.rows.potential(j, at.r + 1);
    if constexpr (kind == Surrogate::slope)
      slope[j] = slope_row(a, at.level + j, at.t, at.i0, at.n, f[j], at.rows.slope + j * at.rows.block);
  });
  const float* const before = at.rows.h + (at.r + 1) * at.rows.stride;
  const T* const grad_s = static_cast<const T*>(a.grad_spikes) + at.t * a.size + at.i0;
  const T* const x = at.x;
  const float* const row = at.row;
  T* const out = at.out;
  float *const sums = at.total, *const pass = at.pass, *const pass_x = at.pass_x;
  const bool is_hard = hard != 0.f;
  Vec decay_sum{}, gain_sum{}, scale_sum{};
  each_vector(at.n, at.prefetch, [=, &decay_sum, &gain_sum, &scale_sum](int64_t i, auto lanes) ALWAYS_INLINE {
    const Vec g = lanes.get(grad_s + i);
    Vec grad_u{};
    each_level<K>([&](int j) ALWAYS_INLINE {
      const Vec f_now = lanes.get(f[j] + i);
      Vec d;
      if constexpr (kind == Surrogate::slope)
        d = lanes.get(slope[j] + i);
      else
        d = derivative<kind>(f_now - threshold[j], p, q);
      const Mask fired = at_least(f_now, fire_at[j]);
      const Vec later = lanes.get(carried[j] + i), grad_v = decay * later;
      Vec grad;
      if constexpr (through == Through::cut) {
        grad = fused(g, d, select(fired, Vec{}, grad_v));
      } else if constexpr (through == Through::zero) {
        grad = fused(d, fused(-f_now, grad_v, g), select(fired, Vec{}, grad_v));
      } else {
        const Vec through_reset = fused(reset_slope, f_now, reset_offset[j]), keep = select(fired, kept, all(1.f));
        grad = fused(grad_v, fused(through_reset, d, keep), g * d);
      }
      if constexpr (learn) {
        const Vec v = select(fired, is_hard ? rest : f_now - threshold[j], f_now);
        decay_sum = fused(later, v - rest, decay_sum);
      }
      if constexpr (rectified) {
        const Vec h = lanes.get(before + i);
        grad = select(below(Vec{}, scale * h), grad, Vec{});
        if constexpr (learn) scale_sum += grad * h;
        grad *= scale;
      }
      if constexpr (learn) gain_sum = fused(grad, row ? lanes.get(row + i) : lanes.get(x + i), gain_sum);
      lanes.put(carried[j] + i, grad);
      grad_u = j == 0 ? grad : grad_u + grad;
    });
    grad_u *= gain;
    if (summed < 0 ? sums != nullptr : summed == 1) {
      lanes.put(sums + i, lanes.get(sums + i) + grad_u);
      return;
    }
    lanes.put(out + i, grad_u);
    if (!pass) return;
    lanes.put(pass + i, lanes.get(pass + i) + grad_u);
    lanes.put(pass_x + i, lanes.get(pass_x + i) + grad_u * lanes.get(x + i));
  });
  if constexpr (learn) {
    at.sums.decay += ends ? 0.f : sum_of(decay_sum);
    at.sums.gain += sum_of(gain_sum), at.sums.scale += sum_of(scale_sum);
  }
}

template <class T, Surrogate kind>
Back<T> back_of(const ScanBackward& a, int levels_at_once, bool total) {
  const bool cut = a.hard && a.detach_reset, zero = a.hard && !a.detach_reset && a.v_rest == 0.f;
  if (a.rectified) return back<T, kind, true, true, Through::any, 1>;
  if (a.grad_constants)
    return cut ? back<T, kind, false, true, Through::cut, 1> : back<T, kind, false, true, Through::any, 1>;
  if (levels_at_once == 3 && total)
    return zero ? back<T, kind, false, false, Through::zero, 3, 1> : back<T, kind, false, false, Through::any, 3, 1>;
  if (levels_at_once == 3)
    return zero ? back<T, kind, false, false, Through::zero, 3, 0> : back<T, kind, false, false, Through::any, 3, 0>;
  return cut ? back<T, kind, false, false, Through::cut, 1> : back<T, kind, false, false, Through::any, 1>;
}

// The surrogates of the papers' neurons by themselves, all others by a row of derivatives.
template <class T>
Back<T> back_of(const ScanBackward& a, int levels_at_once, bool total) {
  switch (a.surrogate) {
    case Surrogate::rational: return back_of<T, Surrogate::rational>(a, levels_at_once, total);
    case Surrogate::rectangle: return back_of<T, Surrogate::rectangle>(a, levels_at_once, total);
    default: return back_of<T, Surrogate::slope>(a, levels_at_once, total);
  }
}

// --- all steps
// --------------------------------------------------------------------------------------------------------

template <class T>
class Backward {
 public:
  explicit Backward(const ScanBackward& a)
      : a_(a),
        learn_(a.rectified || a.grad_constants),
        normed_(a.grad_norm != nullptr),
        total_(a.sum_steps || a.grad_sum || a.levels != levels_at_once(a)),
        at_once_(levels_at_once(a)),
        block_(block_of(a)),
        distance_(prefetch_distance(a.chunk)),
        last_start_((a.steps - 1) / a.chunk * a.chunk),
        non_temporal_(!a.sum_steps && exceeds_caches<T>(a.steps * a.size)),
        charge_(charge_of<T>(a, at_once_, Currents<T>::source_of(a, a.levels > at_once_))),
        back_(back_of<T>(a, at_once_, total_)) {}

  int run() {
    // A fixed number of groups of blocks, each with sums of its own, added in order: the result does not depend on the
    // number of threads.
    const int64_t C = a_.layout.channels, blocks = (a_.size + block_ - 1) / block_, groups = groups_of(blocks, normed_);
    const int64_t constants = learn_ ? 3 : 0, partial_size = constants + (normed_ ? 2 * C : 0);
    double* partial = static_cast<double*>(std::calloc(groups * partial_size + 1, sizeof(double)));
    if (partial == nullptr) return OUT_OF_MEMORY;
    const int64_t bytes = BackwardRows(a_, at_once_, nullptr, 0).count * BackwardRows::spaced(block_) * 4;
    const int failed = for_groups(blocks, groups, bytes, a_.threads, a_.steps * a_.size < MIN_PARALLEL_SCAN,
                                  [&](int64_t group, int64_t first, int64_t last, float* scratch) {
      double* mine = partial + group * partial_size;
      run_group(first, last, scratch, mine, mine + constants);
    });
    if (a_.grad_constants) {
      std::memset(a_.grad_constants, 0, 3 * sizeof(double));
      reduce_partials(partial, groups, partial_size, 3, a_.grad_constants);
    }
    if (normed_) {
      std::memset(a_.grad_norm, 0, 2 * C * sizeof(double));
      reduce_partials(partial + constants, groups, partial_size, 2 * C, a_.grad_norm);
    }
    std::free(partial);
    return failed;
  }

 private:
  static int levels_at_once(const ScanBackward& a) {
    return a.levels == 3 && !a.rectified && !a.grad_constants ? 3 : 1;
  }

  // The rows of a block stay in the first cache; where they are many, in the second one, lest they get short: every row
  // begins in another page of memory.
  static int64_t block_of(const ScanBackward& a) {
    const int64_t count = BackwardRows(a, levels_at_once(a), nullptr, 0).count;
    const int64_t near = block_size(count * 4, (a.levels > 1 ? 2 : 1) * FIRST_CACHE, 2048);
    const int64_t budget = near < 512 ? block_size(count * 4, SECOND_CACHE, 1024) : near;
    return a.factor ? whole_periods(a.layout, budget) : even_block(a.size, budget);
  }

  void run_group(int64_t first, int64_t last, float* scratch, double* constant_sums, double* norm_sums) const {
    const BackwardRows rows(a_, at_once_, scratch, block_);
    Currents<T> currents(a_, a_.levels > at_once_, rows.currents, block_);
    const bool fixed = normed_ && repeats(a_.layout, block_);
    const auto gather_sums = [&](int64_t i0, int64_t n) {
      sum_by_channel(a_.layout, i0, n, rows.pass, norm_sums);
      sum_by_channel(a_.layout, i0, n, rows.pass_x, norm_sums + a_.layout.channels);
    };
    if (normed_) std::memset(rows.pass, 0, block_ * 4), std::memset(rows.pass_x, 0, block_ * 4);
    ConstantSums sums;
    for (int64_t i0 = first * block_; i0 < smaller(last * block_, a_.size); i0 += block_) {
      const int64_t n = smaller(block_, a_.size - i0);
      currents.enter(i0, n);
      for (int64_t k = 0; k < a_.levels; k += at_once_) run_levels(k, i0, n, rows, currents, sums);
      if (normed_ && !fixed) gather_sums(i0, n);
    }
    if (fixed) gather_sums(0, block_);
    fence_non_temporal();
    if (learn_) constant_sums[0] = sums.decay, constant_sums[1] = sums.gain, constant_sums[2] = sums.scale;
  }

  // All steps of some levels of a block, a chunk of them at a time: potentials again, then back.
  void run_levels(int64_t k, int64_t i0, int64_t n, const BackwardRows& rows, Currents<T>& currents,
                  ConstantSums& sums) const {
    const int64_t place = k * a_.size + i0;  // of the first level's potentials
    for (int j = 0; j < at_once_; j++) {
      const float* grad_v = a_.grad_v_out ? a_.grad_v_out + place + j * a_.size : nullptr;
      read_state(grad_v, 0.f, n, rows.carried + j * block_);
    }
    for (int64_t t0 = last_start_; t0 >= 0; t0 -= a_.chunk) {
      const int64_t t1 = smaller(t0 + a_.chunk, a_.steps);
      const float* v = t0 > 0 ? a_.starts + (t0 / a_.chunk - 1) * a_.levels * a_.size : a_.v;
      for (int j = 0; j < at_once_; j++)
        read_state(v ? v + place + j * a_.size : nullptr, a_.v_rest, n, rows.potential(j, 0));
      for (int64_t t = t0; t < t1; t++) {
        PrefetchList<T> prefetch;
        if (t + distance_ < t1)
          currents.needed(t + distance_, false, prefetch);
        else
          needed(larger(2 * t1 - 1 - t - distance_, t0), i0, prefetch);
        charge_(a_, {k, t - t0, n, currents.at(t), rows, prefetch});
      }
      const NoSubnormals none;
      for (int64_t t = t1 - 1; t >= t0; t--) step_back(k, t, t0, i0, n, rows, currents, sums);
    }
    for (int j = 0; j < at_once_; j++) finish_state(place + j * a_.size, n, rows.carried + j * block_, sums);
  }

  // What reaches the initial potentials, and with them the decay of the first charge.
  void finish_state(int64_t place, int64_t n, const float* carried, ConstantSums& sums) const {
    const float decay = a_.decay, rest = a_.v_rest, *v = a_.v + place;
    if (learn_ && a_.v) {
      double sum = 0;
      for (int64_t i = 0; i < n; i++) sum += carried[i] * (v[i] - rest);
      sums.decay += sum;
    }
    float* grad_v = a_.grad_v + place;
    if (a_.grad_v == nullptr) return;
    for (int64_t i = 0; i < n; i++) grad_v[i] = decay * carried[i];
  }

  // Step t back of levels from k on, in the chunk that begins with step t0.
  void step_back(int64_t k, int64_t t, int64_t t0, int64_t i0, int64_t n, const BackwardRows& rows,
                 Currents<T>& currents, ConstantSums& sums) const {
    PrefetchList<T> prefetch;
    const int64_t later = distance_ - 1 - (t - t0);
    if (later < 0)
      needed(t - distance_, i0, prefetch);
    else if (t0 > 0)
      currents.needed(t0 - a_.chunk + later, false, prefetch);
    else
      currents.needed(smaller(last_start_ + later, a_.steps - 1), true, prefetch);
    T* to = static_cast<T*>(a_.grad_u) + (a_.sum_steps ? 0 : t * a_.size) + i0;
    T* out = non_temporal_ ? reinterpret_cast<T*>(rows.over_steps) : to;
    const T* x = static_cast<const T*>(a_.x) + t * a_.x_stride + i0;
    const float* row = learn_ && a_.factor ? currents.row(t) : nullptr;
    float* total = total_ ? rows.total + (a_.levels == at_once_ ? 0 : t) * block_ : nullptr;
    if (total && k == 0) std::memset(total, 0, n * 4);
    float *pass = normed_ ? rows.pass : nullptr, *pass_x = normed_ ? rows.pass_x : nullptr;
    back_(a_, {k, t, t - t0, i0, n, x, row, out, total, pass, pass_x, rows, prefetch, sums});
    if (k < a_.levels - at_once_) return;
    if (total) finish_total(t, i0, n, x, total, rows, out);
    if (non_temporal_) store_non_temporal(to, out, n);
  }

  // What becomes of the gradients of a step that several passes have summed.
  void finish_total(int64_t t, int64_t i0, int64_t n, const T* x, float* total, const BackwardRows& rows,
                    T* out) const {
    if (a_.grad_sum) {
      const T* grad_sum = static_cast<const T*>(a_.grad_sum) + t * a_.size + i0;
      for (int64_t i = 0; i < n; i++) total[i] += load(grad_sum, i);
    }
    if (normed_) {
      float *pass = rows.pass, *pass_x = rows.pass_x;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) pass[i] += total[i], pass_x[i] += total[i] * load(x, i);
    }
    if (!a_.sum_steps) {
      for (int64_t i = 0; i < n; i++) store(out, i, total[i]);
      return;
    }
    float* sum = rows.over_steps;
    if (t == a_.steps - 1) std::memcpy(sum, total, n * 4);
    for (int64_t i = 0; t < a_.steps - 1 && i < n; i++) sum[i] += total[i];
    for (int64_t i = 0; t == 0 && i < n; i++) store(out, i, sum[i]);
  }

  // What step t back needs.
  void needed(int64_t t, int64_t i0, PrefetchList<T>& prefetch) const {
    const int64_t place = t * a_.size + i0;
    prefetch.add(static_cast<const T*>(a_.grad_spikes) + place);
    if (a_.grad_sum) prefetch.add(static_cast<const T*>(a_.grad_sum) + place);
    if (!a_.sum_steps && !non_temporal_) prefetch.add(static_cast<const T*>(a_.grad_u) + place);
  }

  const ScanBackward& a_;
  const bool learn_, normed_, total_;
  const int at_once_;
  const int64_t block_, distance_, last_start_;
  const bool non_temporal_;
  const Charge<T> charge_;
  const Back<T> back_;
};

}  // namespace

int scan_backward(const ScanBackward& a) {
  if (a.steps > a.chunk && a.size > 0 && a.starts == nullptr) return UNSUPPORTED;
  return a.dtype == Dtype::float32 ? Backward<float>(a).run() : Backward<bfloat16>(a).run();
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
