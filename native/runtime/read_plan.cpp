// The plan's JSON: every field of the right type and range, none that is not known.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.hpp"
#include "runtime/plan.hpp"

namespace spikeloom::runtime {
namespace {

constexpr int64_t SIZE = 1 << 20, MARGIN = 1 << 10, ANY = std::numeric_limits<int64_t>::max();

// What float32 makes of a number: infinity beyond its range.
float as_float(double number) {
  constexpr double most = std::numeric_limits<float>::max();
  if (std::fabs(number) > most * (1 + 0x1p-25)) return std::copysign(std::numeric_limits<float>::infinity(), number);
  return static_cast<float>(number);
}

// The fields of an object, each of which is asked for once.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (object.kind != Json::object) refuse(where_ + ": no object");
  }

  int64_t whole(const char* name, int64_t low, int64_t high, std::optional<int64_t> given = {}) {
    const Json* found = find(name, given.has_value());
    return found == nullptr ? *given : in_range(*found, name, low, high);
  }
  bool flag(const char* name, std::optional<bool> given = {}) {
    const Json* found = find(name, given.has_value());
    if (found == nullptr) return *given;
    if (found->kind != Json::boolean) fail(name, "must be true or false");
    return found->whole != 0;
  }
  float number(const char* name, std::optional<float> given = {}) {
    const Json* found = find(name, given.has_value());
    return found == nullptr ? *given : real(*found, name);
  }
  std::string text(const char* name) {
    const Json* found = find(name, false);
    if (found->kind != Json::text) fail(name, "must be a text");
    return found->string;
  }
  std::optional<std::string> optional_text(const char* name) {
    const Json* found = find(name, true);
    if (found == nullptr || found->kind == Json::null) return {};
    if (found->kind != Json::text) fail(name, "must be a text or null");
    return found->string;
  }
  // Null, or not there where it need not be: a null pointer.
  const Json* nullable(const char* name, bool may_lack) {
    const Json* found = find(name, may_lack);
    return found == nullptr || found->kind == Json::null ? nullptr : found;
  }
  const Json& list(const char* name, size_t least, size_t most) {
    const Json* found = find(name, false);
    if (found->kind != Json::list || found->items.size() < least || found->items.size() > most)
      fail(name, "must be a list of some values");
    return *found;
  }
  std::vector<int64_t> wholes(const char* name, size_t least, size_t most, int64_t low, int64_t high) {
    std::vector<int64_t> all;
    for (const Json& item : list(name, least, most).items) all.push_back(in_range(item, name, low, high));
    return all;
  }
  float real(const Json& found, const char* name) const {
    if (found.kind != Json::real && found.kind != Json::integer) fail(name, "must be a number");
    return as_float(found.number);
  }
  bool has(const char* name) const { return object_.find(name) != nullptr; }
  void end() const {
    for (const std::string& key : object_.keys)
      if (std::find(asked_.begin(), asked_.end(), key) == asked_.end()) fail(key.c_str(), "is not known");
  }
  [[noreturn]] void fail(const char* name, const char* what) const { refuse(where_ + "." + name + ": " + what); }

 private:
  const Json& object_;
  std::string where_;
  std::vector<std::string_view> asked_;

  const Json* find(const char* name, bool may_lack) {
    asked_.push_back(name);
    const Json* found = object_.find(name);
    if (found == nullptr && !may_lack) fail(name, "is missing");
    return found;
  }
  int64_t in_range(const Json& found, const char* name, int64_t low, int64_t high) const {
    if (found.kind != Json::integer) fail(name, "must be a whole number");
    if (found.whole < low || found.whole > high) fail(name, "is out of its range");
    return found.whole;
  }
};

Neuron read_neuron(const Json& json, const std::string& where) {
  Fields fields(json, where + ".neuron");
  Neuron neuron;
  neuron.decay = fields.number("decay"), neuron.gain = fields.number("gain");
  neuron.threshold.clear();
  for (const Json& item : fields.list("threshold", 1, MOST_LEVELS).items)
    neuron.threshold.push_back(fields.real(item, "threshold"));
  if (const Json* reset = fields.nullable("v_reset", false)) neuron.v_reset = fields.real(*reset, "v_reset");
  neuron.fire_at = neuron.threshold;
  if (fields.flag("strict_firing"))
    for (float& at : neuron.fire_at) at = std::nextafter(at, std::numeric_limits<float>::infinity());
  fields.end();
  return neuron;
}

void read_fired(Fields& fields, Step& step, const std::string& where) {
  if (const Json* residual = fields.nullable("residual", true)) {
    if (residual->kind != Json::integer || residual->whole < 0) fields.fail("residual", "must be a value's number");
    step.reads.push_back(residual->whole), step.residual = true;
  }
  step.keep_sum = fields.flag("keep_sum", true);
  if (const Json* neuron = fields.nullable("neuron", true)) step.neuron = read_neuron(*neuron, where);
}

void read_conv(Fields& fields, Step& step) {
  step.weight = fields.text("weight");
  step.factor = fields.optional_text("scale"), step.bias = fields.optional_text("bias");
  step.stride = fields.whole("stride", 1, 64, 1), step.groups = fields.whole("groups", 1, SIZE, 1);
  if (fields.has("padding")) {
    const auto padding = fields.wholes("padding", 2, 2, 0, MARGIN);
    step.padding[0] = padding[0], step.padding[1] = padding[1];
  }
  const std::string way = fields.has("way") ? fields.text("way") : "dense";
  if (way != "event" && way != "dense" && way != "direct") fields.fail("way", "is not known");
  step.way = way == "event" ? Way::event : way == "dense" ? Way::dense : Way::direct;
}

constexpr std::pair<std::string_view, Op> OPS[] = {
    {"conv", Op::conv},
    {"fire", Op::fire},
    {"max_pool", Op::max_pool},
    {"avg_pool", Op::avg_pool},
    {"pad_channels", Op::pad_channels},
    {"mean", Op::mean},
    {"flatten", Op::flatten},
    {"relu", Op::relu},
    {"sigmoid", Op::sigmoid},
    {"clamp", Op::clamp},
    {"scale", Op::scale},
    {"shift", Op::shift},
    {"complement", Op::complement},
    {"affine", Op::affine},
    {"divide", Op::divide},
    {"time_mean", Op::time_mean},
    {"time_sum", Op::time_sum},
    {"time_last", Op::time_last},
    {"add", Op::add},
    {"mul", Op::mul},
    {"or", Op::either},
    {"cat", Op::cat},
    {"attention", Op::attention},
};

// What the op alone has, besides what it reads.
void read_own(Fields& fields, Step& step, const std::string& where) {
  switch (step.op) {
    case Op::conv: read_fired(fields, step, where), read_conv(fields, step); break;
    case Op::fire: read_fired(fields, step, where); break;
    case Op::max_pool:
    case Op::avg_pool:
      step.kernel = fields.whole("kernel", 1, 256), step.stride = fields.whole("stride", 1, 256);
      step.padding[0] = step.padding[1] = fields.whole("padding", 0, MARGIN, 0);
      step.ceil = fields.flag("ceil", false), step.count_padding = fields.flag("count_padding", true);
      break;
    case Op::pad_channels:
      step.before = fields.whole("before", 0, 1 << 16), step.behind = fields.whole("behind", 0, 1 << 16);
      break;
    case Op::relu:
    case Op::sigmoid:
    case Op::clamp:
    case Op::scale:
    case Op::shift:
    case Op::complement: step.low = fields.number("low", 0.f), step.high = fields.number("high", 0.f); break;
    case Op::affine:
    case Op::divide: step.weight = fields.optional_text("weight"), step.bias = fields.optional_text("bias"); break;
    case Op::attention: step.heads = fields.whole("heads", 1, SIZE), step.high = fields.number("scale"); break;
    default: break;
  }
}

Step read_step(const Json& json, size_t number) {
  const std::string where = "steps." + std::to_string(number);
  Fields fields(json, where);
  Step step;
  const std::string op = fields.text("op");
  const auto* known = std::find_if(std::begin(OPS), std::end(OPS), [&](const auto& one) { return one.first == op; });
  if (known == std::end(OPS)) fields.fail("op", "is not known");
  step.op = known->second;
  step.layer = fields.text("layer");
  step.out = fields.wholes("out", 0, 2, std::numeric_limits<int64_t>::min(), ANY);
  if (step.op == Op::attention)
    for (const char* name : {"q", "k", "v"}) step.reads.push_back(fields.whole(name, 0, ANY));
  else if (step.op >= Op::add && step.op <= Op::cat)
    step.reads = fields.wholes("xs", 2, 64, 0, ANY);
  else
    step.reads.push_back(fields.whole("x", 0, ANY));
  read_own(fields, step, where);
  fields.end();
  return step;
}

}  // namespace

Plan read_plan(const std::string& text) {
  const Json json = parse_json(text);
  Fields fields(json, "plan");
  Plan plan;
  const Json* input = fields.nullable("input", false);
  if (input == nullptr) fields.fail("input", "is missing");
  Fields value(*input, "input");
  plan.input.height = value.whole("height", 1, SIZE), plan.input.width = value.whole("width", 1, SIZE);
  plan.input.channels = value.whole("channels", 1, SIZE);
  if (const Json* most = value.nullable("most", true)) {
    if (most->kind != Json::integer || most->whole < 1 || most->whole > 255) value.fail("most", "is not 1 to 255");
    plan.input.most = static_cast<int>(most->whole);
  }
  plan.input.is_static = value.flag("static", false);
  value.end();
  plan.T = fields.whole("T", 1, 1 << 16);
  plan.per_step = fields.flag("per_step", true), plan.fixed_T = fields.flag("fixed_T", false);
  const Json& steps = fields.list("steps", 1, 1 << 14);
  for (size_t i = 0; i < steps.items.size(); i++) plan.steps.push_back(read_step(steps.items[i], i));
  fields.end();
  return plan;
}

}  // namespace spikeloom::runtime
