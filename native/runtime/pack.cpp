#include <algorithm>

#include "runtime/network.hpp"

namespace spikeloom::runtime {
namespace {

constexpr int64_t FAR = 8 << 20;   // bytes of a layer's weights that a core reads anew for every batch
constexpr int64_t SHORT = 0x7fff;  // the largest sum of 16 bits

void check(int status) {
  if (status == OUT_OF_MEMORY) throw std::bad_alloc();
  need(status == OK, "a layer that no kernel runs");
}

// The event kernel's order of a layer's weights.
struct Order {
  EnginePack a{};
  int64_t counts[4] = {};
  const Kernels& kernels;

  Order(const Kernels& known, const Packed& layer, const Step& step, const Value& x, const float* weight, bool integers)
      : kernels(known) {
    a.in = layer.shape[1], a.out = layer.shape[0], a.kernel_height = layer.shape[2], a.kernel_width = layer.shape[3];
    a.stride = step.stride, a.depthwise = layer.depthwise, a.binary = x.most == 1, a.integers = integers;
    a.weight = weight, a.counts = counts;
    check(kernels.engine_pack(a));
  }
  std::vector<float> packed(std::vector<uint16_t>* half) {
    std::vector<float> found(static_cast<size_t>(counts[0]));
    if (half != nullptr) half->resize(found.size());
    a.packed = found.data(), a.half = half == nullptr ? nullptr : half->data();
    check(kernels.engine_pack(a));
    return found;
  }
};

// Behind which groups of integers sums of 16 bits have to move to 32; false where one group exceeds them.
bool widened(const std::vector<float>& packed, const int64_t* counts, int most, std::vector<uint8_t>& widen) {
  const int64_t groups = counts[1], rows = counts[2], block = counts[3];
  const int64_t blocks = static_cast<int64_t>(packed.size()) / (groups * rows * block), lanes = blocks * block;
  // What inputs could make of a group at most, up and down.
  std::vector<int64_t> reach(2 * lanes), total(2 * lanes);
  widen.assign(groups, 0);
  for (int64_t group = 0; group < groups; group++) {
    std::fill(reach.begin(), reach.end(), 0);
    for (int64_t lane = 0; lane < lanes; lane++)
      for (int64_t row = 0; row < rows; row++) {
        const int64_t at = ((lane / block * groups + group) * rows + row) * block + lane % block;
        const auto weight = static_cast<int64_t>(packed[at]);
        reach[weight > 0 ? lane : lanes + lane] += most * std::abs(weight);
      }
    for (int64_t i = 0; i < 2 * lanes; i++) total[i] += reach[i];
    if (*std::max_element(total.begin(), total.end()) <= SHORT) continue;
    total = reach;
    if (group == 0 || *std::max_element(total.begin(), total.end()) > SHORT) return false;
    widen[group - 1] = 1;
  }
  if (*std::max_element(widen.begin(), widen.end()) == 0) widen.clear();
  return true;
}

template <class Number>
std::vector<Number> as(const std::vector<float>& floats) {
  std::vector<Number> found(floats.size());
  std::transform(floats.begin(), floats.end(), found.begin(), [](float f) { return static_cast<Number>(f); });
  return found;
}

void pack_direct(const Kernels& kernels, Packed& layer, const Step& step, const std::vector<float>& real) {
  EnginePackDirect a{};
  int64_t count = 0;
  a.in = layer.shape[1] * step.groups, a.out = layer.shape[0], a.groups = step.groups;
  a.kernel_height = layer.shape[2], a.kernel_width = layer.shape[3], a.weight = real.data(), a.count = &count;
  check(kernels.engine_pack_direct(a));
  layer.weight.resize(count), a.packed = layer.weight.data();
  check(kernels.engine_pack_direct(a));
}

}  // namespace

Packed pack(const Kernels& kernels, const Step& step, const Value& x, const Tensors& tensors) {
  const Tensor& kept = tensors.at(*step.weight);
  Packed layer;
  layer.shape = kept.shape, layer.depthwise = step.depthwise(kept), layer.direct = step.way != Way::event;
  std::vector<float> real = kept.floats(), whole;
  if (step.factor) {
    whole = real;
    layer.scale = tensors.at(*step.factor).floats();
    const size_t filter = real.size() / layer.scale.size();
    for (size_t i = 0; i < real.size(); i++) real[i] *= layer.scale[i / filter];
  }
  layer.bias = step.bias ? tensors.at(*step.bias).floats() : std::vector<float>(kept.shape[0]);
  if (layer.direct) {
    pack_direct(kernels, layer, step, real);
    return layer;
  }
  Order floats(kernels, layer, step, x, real.data(), false);
  if (step.factor && !layer.depthwise) {
    Order integers(kernels, layer, step, x, whole.data(), true);
    // Else there are few outputs: half of every vector would be empty.
    if (static_cast<double>(integers.counts[0]) < 1.5 * static_cast<double>(floats.counts[0])) {
      const std::vector<float> packed = integers.packed(nullptr);
      if (widened(packed, integers.counts, x.most, layer.widen)) {
        if (2 * integers.counts[0] > FAR)
          layer.bytes = as<int8_t>(packed);
        else
          layer.shorts = as<int16_t>(packed);
        return layer;
      }
    }
  }
  layer.widen.clear();
  // Where the caches hold float32, taking words apart costs more than it saves.
  const bool half = kept.type == Type::bfloat16 && !layer.depthwise && 4 * floats.counts[0] > FAR;
  layer.weight = floats.packed(half ? &layer.half : nullptr);
  if (half) layer.weight.clear(), layer.weight.shrink_to_fit();
  return layer;
}

}  // namespace spikeloom::runtime
