// What a file asks to be run: values, and the steps that make them (docs/engine-file.md), checked before anything runs
// by the rules of src/spikeloom/deploy/engine/ir.py.
#pragma once

#include <optional>

#include "runtime/tensors.hpp"

namespace spikeloom::runtime {

// One step of a map. `most` is the largest of spikes, 0 of real values; a static map is the same at every step.
struct Value {
  int64_t height = 1, width = 1, channels = 1;
  int most = 0;
  bool is_static = false;

  bool spikes() const { return most > 0; }
  int64_t size() const { return height * width * channels; }
  int64_t bytes() const { return size() * (spikes() ? 1 : 4); }
  bool same_shape(const Value& other) const {
    return height == other.height && width == other.width && channels == other.channels;
  }
};

struct Neuron {
  float decay = 0, gain = 1;
  std::vector<float> threshold{0.f}, fire_at{0.f};  // they differ in the last bit, where firing is strict
  std::optional<float> v_reset;
};

enum class Op {
  conv,
  fire,
  max_pool,
  avg_pool,
  pad_channels,
  mean,
  flatten,
  relu,
  sigmoid,
  clamp,
  scale,
  shift,
  complement,
  affine,
  divide,
  time_mean,
  time_sum,
  time_last,
  add,
  mul,
  either,
  cat,
  attention
};
enum class Way { event, dense, direct };

// One step; which of the fields mean something depends on `op`.
struct Step {
  Op op = Op::conv;
  std::string layer;
  std::vector<int64_t> out;
  std::vector<int64_t> reads;  // a shortcut is the second
  bool residual = false, keep_sum = true;
  std::optional<Neuron> neuron;
  std::optional<std::string> weight, factor, bias;  // `factor` is called scale in the file
  int64_t stride = 1, padding[2] = {0, 0}, groups = 1;
  Way way = Way::dense;
  int64_t kernel = 1;
  bool ceil = false, count_padding = true;
  int64_t before = 0, behind = 0, heads = 1;
  float low = 0, high = 0;  // `high` is the scale of attention too

  bool depthwise(const Tensor& kernel) const { return groups > 1 && groups == kernel.shape[0] && kernel.shape[1] == 1; }
};

struct Plan {
  Value input;
  int64_t T = 1;
  bool per_step = true, fixed_T = false;
  std::vector<Step> steps;
};

struct Cost {
  double bytes = 0, operations = 0;  // of one image
};

Plan read_plan(const std::string& text);

// All values, from the input on; refuses steps that read what is not there, write in another order, or do not fit.
std::vector<Value> values_of(const Plan& plan, const Tensors& tensors);

Cost cost_of(const Plan& plan, const std::vector<Value>& values, const Tensors& tensors);

// Of every value, which other one's memory it takes: a sum that is written over its shortcut, which no step reads
// later.
std::vector<int64_t> places_of(const Plan& plan, const std::vector<Value>& values);

}  // namespace spikeloom::runtime
