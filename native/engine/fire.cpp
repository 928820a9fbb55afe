// Neurons behind a layer that was computed otherwise:
//
//   for t, i:  spikes[t, i] = neuron i of (x[t, i] + residual[t, i])                         (engine/epilogue.hpp)
#include "engine/epilogue.hpp"
#include "engine/items.hpp"

namespace spikeloom::SPIKELOOM_LEVEL {

int engine_fire(const EngineFire& a) {
  if (a.levels > MOST_LEVELS) return UNSUPPORTED;
  constexpr int64_t BLOCK = 64 * LANES;
  return for_items((a.size + BLOCK - 1) / BLOCK, 0, a.threads, [&](int64_t item, float*) {
    const int64_t first = item * BLOCK;
    fire_span(a, first, smaller(BLOCK, a.size - first), a.size, a.x + first, a.x_stride, a.once);
  });
}

}  // namespace spikeloom::SPIKELOOM_LEVEL
