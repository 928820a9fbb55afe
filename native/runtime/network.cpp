#include "runtime/network.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <thread>

#include "runtime/arena.hpp"
#include "team.hpp"

namespace spikeloom::runtime {
namespace {

// Images that go through all layers together, as in src/spikeloom/deploy/engine/engine.py.
constexpr int64_t FEWEST = 16, MOST = 64, MAP_BYTES = 6 << 20;
constexpr double MOST_BYTES = 4. * (1 << 30);
constexpr int64_t MOST_STEPS = 1 << 24, MOST_IMAGES = 1 << 24;

std::atomic<int> chosen_threads = 0;

// What OpenMP's programs take: the number in the environment, or all cores.
int usual_threads() {
  const char* given = std::getenv("OMP_NUM_THREADS");
  const int64_t count = given == nullptr ? 0 : std::strtol(given, nullptr, 10);
  if (count >= 1 && count <= MOST_THREADS) return static_cast<int>(count);
  return static_cast<int>(std::clamp<int64_t>(std::thread::hardware_concurrency(), 1, MOST_THREADS));
}

int threads() {
  static const int usual = usual_threads();
  if (forked()) return 1;
  const int chosen = chosen_threads;
  return chosen > 0 ? chosen : usual;
}

void check_cost(double found, double most, const char* unit, const char* name) {
  if (found > most)
    refuse("an image takes " + std::to_string(static_cast<int64_t>(found)) + " " + unit + ", the limit is " +
           std::to_string(static_cast<int64_t>(most)) + ": raise " + name);
}

}  // namespace

void set_threads(int count) { chosen_threads = count; }

Network::Network(std::string_view file, double max_bytes, double max_operations) : kernels_(*active()) {
  const File read = read_safetensors(file);
  const Json* format = read.metadata.find("format");
  need(format != nullptr && format->string == "spikeloom event engine 1",
       "not an event engine ('spikeloom event engine 1' is missing in its header)");
  try {
    const Json* plan = read.metadata.find("plan");
    plan_ = read_plan(plan == nullptr ? "" : plan->string);
    values_ = values_of(plan_, read.tensors);
    cost_ = cost_of(plan_, values_, read.tensors);
    check_cost(cost_.bytes, max_bytes, "bytes of maps", "max_bytes");
    check_cost(cost_.operations, max_operations, "operations", "max_operations");
  } catch (const Refused& error) {
    refuse("plan: " + std::string(error.what()));
  }
  places_ = places_of(plan_, values_);
  for (const Step& step : plan_.steps)
    packed_.push_back(step.op == Op::conv ? pack(kernels_, step, values_[step.reads[0]], read.tensors) : Packed{});
  keep_constants(read.tensors);
}

Network::~Network() = default;

void Network::keep_constants(const Tensors& tensors) {
  for (const Step& step : plan_.steps) {
    if (step.op != Op::affine && step.op != Op::divide) continue;
    for (const auto& name : {step.weight, step.bias})
      if (name) floats_[*name] = tensors.at(*name).floats(), sides_[*name] = tensors.at(*name).shape;
  }
}

int64_t Network::count(int64_t steps, int64_t images) const {
  need(steps >= 1 && steps <= MOST_STEPS && images >= 1 && images <= MOST_IMAGES, "steps and images must be 1 or more");
  need(!plan_.input.is_static || steps == 1, "this network takes images, which are one step");
  if (plan_.fixed_T && !plan_.input.is_static && steps != plan_.T)
    refuse("this network takes sequences of " + std::to_string(plan_.T) + " steps");
  const int64_t T = plan_.input.is_static ? plan_.T : steps;
  return (plan_.per_step ? T : 1) * images * values_.back().channels;
}

int64_t Network::most_images(int64_t T) const {
  int64_t steady = 0, step = 0;  // bytes of the largest maps of one image
  for (const Value& value : values_)
    (value.is_static ? steady : step) = std::max(value.is_static ? steady : step, value.bytes());
  const int64_t fit = std::min(std::max(MAP_BYTES / std::max(steady, T * step), FEWEST), MOST);
  const double room = std::floor(MOST_BYTES * static_cast<double>(plan_.T) / (cost_.bytes * static_cast<double>(T)));
  return std::max(int64_t{1}, static_cast<int64_t>(std::min(static_cast<double>(fit), room)));
}

void Network::run_part(const Input& input, int64_t T, float* logits, Potentials* potentials) const {
  std::unique_ptr<Arena> arena;
  {
    const std::lock_guard<std::mutex> held(lock_);
    if (!idle_.empty()) arena = std::move(idle_.back()), idle_.pop_back();
  }
  if (arena == nullptr) arena = std::make_unique<Arena>(*this);
  const int shared = threads();
  const Awake awake(shared);
  arena->run(input, T, shared, logits, potentials);
  const std::lock_guard<std::mutex> held(lock_);
  idle_.push_back(std::move(arena));
}

void Network::run(const float* x, int64_t steps, int64_t images, float* logits) const {
  const int64_t T = plan_.input.is_static ? plan_.T : steps;
  const int64_t most = most_images(T), parts = (images + most - 1) / most;
  int64_t first = 0;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t N = images / parts + (part < images % parts ? 1 : 0);
    run_part({x, steps, images, first, N}, T, logits, nullptr);
    first += N;
  }
}

void Network::advance(const float* x, int64_t steps, int64_t images, float* logits, Potentials& potentials) const {
  potentials.resize(plan_.steps.size());
  run_part({x, steps, images, 0, images}, steps, logits, &potentials);
}

}  // namespace spikeloom::runtime
