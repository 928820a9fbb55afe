// Batch statistics, and the last pass of a normalisation's gradient, channels of [steps, size] tensors:
//
//   moments:  mean[c] = sum over t, i of channel c of x[t, i] / n,   variance[c] = sum of (x[t, i] - mean[c])^2 / n
//   affine:   out[t, i] = a[c] g[t, i] + b[c] x[t, i] + c[c]
#include <type_traits>

#include "common/channels.hpp"
#include "common/prefetch.hpp"
#include "common/threads.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {
namespace {

template <class T>
int moments(const Moments& a) {
  const int64_t C = a.layout.channels, block = whole_periods(a.layout, 2048);
  const bool fixed = repeats(a.layout, block);
  const int64_t blocks = (a.size + block - 1) / block, groups = groups_of(blocks, true);
  double* partial = static_cast<double*>(std::calloc(groups * 2 * C, sizeof(double)));
  float* pivots = static_cast<float*>(std::malloc(C * sizeof(float)));
  if (partial == nullptr || pivots == nullptr) {
    std::free(partial), std::free(pivots);
    return OUT_OF_MEMORY;
  }
  for (int64_t c = 0; c < C; c++) pivots[c] = load(static_cast<const T*>(a.x), c * a.layout.inner);
  const int failed = for_groups(blocks, groups, 3 * block * 4, a.threads, a.steps * a.size < MIN_PARALLEL,
                                [&](int64_t group, int64_t first, int64_t last, float* rows) {
    float *pivot = rows, *sum = rows + block, *squares = rows + 2 * block;
    double* mine = partial + group * 2 * C;
    std::memset(sum, 0, 2 * block * 4);
    if (fixed) broadcast_channels(a.layout, 0, block, pivots, pivot);
    for (int64_t i0 = first * block; i0 < smaller(last * block, a.size); i0 += block) {
      const int64_t n = smaller(block, a.size - i0);
      if (!fixed) broadcast_channels(a.layout, i0, n, pivots, pivot);
      const auto add = [&](auto both, int64_t t) {
        constexpr bool two = both;
        const T *x = static_cast<const T*>(a.x) + t * a.x_stride + i0, *next = x + a.x_stride;
        PrefetchList<T> prefetch;
        prefetch.add(x + block);
        if (two) prefetch.add(next + block);
        each_in_pieces(n, prefetch, [=](int64_t i) ALWAYS_INLINE {
          float d = load(x, i) - pivot[i], total = d, square = d * d;
          if constexpr (two) d = load(next, i) - pivot[i], total += d, square += d * d;
          sum[i] += total;
          squares[i] += square;
        });
      };
      // Two steps at a time share the sums' loads and stores.
      int64_t t = 0;
      for (; t + 2 <= a.steps; t += 2) add(std::true_type(), t);
      if (t < a.steps) add(std::false_type(), t);
      if (!fixed || (i0 / block - first) % 16 == 15) {
        sum_by_channel(a.layout, i0, n, sum, mine);
        sum_by_channel(a.layout, i0, n, squares, mine + C);
      }
    }
    if (fixed) {
      sum_by_channel(a.layout, 0, block, sum, mine);
      sum_by_channel(a.layout, 0, block, squares, mine + C);
    }
  });
  // The first group's sums take all.
  reduce_partials(partial + 2 * C, groups - 1, 2 * C, 2 * C, partial);
  const double count = static_cast<double>(a.steps * a.size / C);
  for (int64_t c = 0; c < C; c++) {
    const double shift = partial[c] / count, variance = partial[C + c] / count - shift * shift;
    a.mean[c] = static_cast<float>(shift + pivots[c]);
    a.variance[c] = static_cast<float>(variance > 0 ? variance : 0);
  }
  std::free(partial), std::free(pivots);
  return failed;
}

template <class T>
int affine(const Affine& a) {
  const int64_t block = whole_periods(a.layout, 2048);
  const bool fixed = repeats(a.layout, block);
  const int64_t blocks = (a.size + block - 1) / block;
  // In place, what is written is in the cache already.
  const bool non_temporal = a.out != a.g && exceeds_caches<T>(a.steps * a.size);
  return for_groups(blocks, groups_of(blocks, true), 4 * block * 4, a.threads, a.steps * a.size < MIN_PARALLEL,
                    [&](int64_t, int64_t first, int64_t last, float* rows) {
    float *pa = rows, *pb = rows + block, *pc = rows + 2 * block;
    const auto fill = [&](int64_t i0, int64_t n) {
      broadcast_channels(a.layout, i0, n, a.a, pa), broadcast_channels(a.layout, i0, n, a.b, pb),
          broadcast_channels(a.layout, i0, n, a.c, pc);
    };
    if (fixed) fill(0, block);
    for (int64_t i0 = first * block; i0 < smaller(last * block, a.size); i0 += block) {
      const int64_t n = smaller(block, a.size - i0);
      if (!fixed) fill(i0, n);
      for (int64_t t = 0; t < a.steps; t++) {
        const T *x = static_cast<const T*>(a.x) + t * a.x_stride + i0,
                *g = static_cast<const T*>(a.g) + t * a.size + i0;
        T *to = static_cast<T*>(a.out) + t * a.size + i0,
          *out = non_temporal ? reinterpret_cast<T*>(rows + 3 * block) : to;
        PrefetchList<T> prefetch;
        prefetch.add(x + block), prefetch.add(g + block);
        if (!non_temporal) prefetch.add(to + block);
        each_in_pieces(n, prefetch, [=](int64_t i) ALWAYS_INLINE {
          store(out, i, pa[i] * load(g, i) + pb[i] * load(x, i) + pc[i]);
        });
        if (non_temporal) store_non_temporal(to, out, n);
      }
    }
    fence_non_temporal();
  });
}

}  // namespace

int moments(const Moments& a) { return a.dtype == Dtype::float32 ? moments<float>(a) : moments<bfloat16>(a); }
int affine(const Affine& a) { return a.dtype == Dtype::float32 ? affine<float>(a) : affine<bfloat16>(a); }

}  // namespace spikeloom::SPIKELOOM_LEVEL
