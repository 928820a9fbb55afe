// A plan with its weights in the kernels' order, and the memory and the calls of a run.
#pragma once

#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <string_view>

#include "levels.hpp"
#include "runtime/plan.hpp"

namespace spikeloom::runtime {

// Memory at the beginning of a cache line, never smaller than it was.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }
  void* of(size_t bytes);

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// Weights of a convolution (`EngineConv` or `EngineDirect`), one of the vectors of numbers filled.
struct Packed {
  std::vector<float> weight, bias, scale;
  std::vector<uint16_t> half;
  std::vector<int16_t> shorts;
  std::vector<int8_t> bytes;
  std::vector<uint8_t> widen;
  std::vector<int64_t> shape;  // of the weight in the file
  bool depthwise = false;
  bool direct = false;
};

// By the rules of src/spikeloom/deploy/engine/pack.py.
Packed pack(const Kernels& kernels, const Step& step, const Value& x, const Tensors& tensors);

using Potentials = std::vector<std::vector<float>>;  // by step, [levels, N, H, W, C]; empty before the first call

// What a call got: x [steps, images, C, H, W], of which a run takes N images from the first on.
struct Input {
  const float* x;
  int64_t steps, images, first, N;
};

class Arena;

class Network {
 public:
  Network(std::string_view file, double max_bytes, double max_operations);
  ~Network();

  // Numbers of the result; refuses steps and images that the network does not take.
  int64_t count(int64_t steps, int64_t images) const;
  // Logits of x [steps, images, C, H, W].
  void run(const float* x, int64_t steps, int64_t images, float* logits) const;
  // The same for the next steps from some potentials, which are replaced by those after them.
  void advance(const float* x, int64_t steps, int64_t images, float* logits, Potentials& potentials) const;

  const Plan& plan() const { return plan_; }
  const std::vector<Value>& values() const { return values_; }
  const Cost& cost() const { return cost_; }

 private:
  friend class Arena;
  const Kernels& kernels_;
  Plan plan_;
  std::vector<Value> values_;
  std::vector<int64_t> places_;
  Cost cost_;
  std::vector<Packed> packed_;                        // by step
  std::map<std::string, std::vector<float>> floats_;  // constants, and their sides below
  std::map<std::string, std::vector<int64_t>> sides_;
  // A call takes an arena and puts it back: there are as many as calls at the same time.
  mutable std::mutex lock_;
  mutable std::vector<std::unique_ptr<Arena>> idle_;

  void keep_constants(const Tensors& tensors);
  void run_part(const Input& input, int64_t T, float* logits, Potentials* potentials) const;
  int64_t most_images(int64_t T) const;
};

constexpr int MOST_THREADS = 1024;

// Threads of all calls; 0 for as many as there are cores.
void set_threads(int threads);

}  // namespace spikeloom::runtime
