// What steps make of what they read, and what that costs.
#include "runtime/plan.hpp"

#include <algorithm>

namespace spikeloom::runtime {
namespace {

constexpr int64_t SIZE = 1 << 20, MOST_ELEMENTS = int64_t{1} << 32;

// The side of which all others are, or 1; 0 where there is none.
int64_t spread(const std::vector<int64_t>& sides) {
  const int64_t longest = *std::max_element(sides.begin(), sides.end());
  return std::all_of(sides.begin(), sides.end(), [&](int64_t side) { return side == 1 || side == longest; }) ? longest
                                                                                                             : 0;
}

using Values = std::vector<Value>;

// What a convolution or a step of neurons makes of its sums.
Values fired(const Step& step, Value sums, const Values& read) {
  Values made;
  if (step.residual) {
    need(read[1].same_shape(sums), "the shortcut's shape differs");
    sums.is_static = sums.is_static && read[1].is_static;
  }
  if (step.keep_sum) made.push_back(sums);
  if (step.neuron) {
    sums.most = static_cast<int>(step.neuron->threshold.size()), sums.is_static = false;
    made.push_back(sums);
  }
  need(!made.empty(), "a step without a result");
  return made;
}

Values conv(const Step& step, const Values& read, const Tensors& tensors) {
  const Value& x = read[0];
  const Tensor& weight = tensors.at(*step.weight);
  if (step.factor)
    need(weight.type == Type::int8, "its weight is not int8");
  else
    need(weight.type == Type::float32 || weight.type == Type::bfloat16, "its weight is not float32 or bfloat16");
  need(weight.shape.size() == 4 && weight.count > 0, "its weight has not four axes of some numbers");
  const int64_t out = weight.shape[0], inside = weight.shape[1];
  need(inside <= SIZE && x.channels == inside * step.groups && out % step.groups == 0 && out <= SIZE,
       "channels do not fit the weight");
  need(!step.bias || tensors.at(*step.bias).is(Type::float32, {out}), "the bias does not fit the weight");
  need(!step.factor || tensors.at(*step.factor).is(Type::float32, {out}), "the scale does not fit the weight");
  const int64_t sides[2] = {x.height, x.width};
  int64_t made[2];
  for (int i = 0; i < 2; i++) {
    const int64_t room = sides[i] + 2 * step.padding[i] - weight.shape[2 + i];
    need(room >= 0, "the kernel is larger than its input");
    made[i] = room / step.stride + 1;
    need(made[i] <= SIZE, "its result is too large");
  }
  const bool events = x.spikes() && !x.is_static && (step.groups == 1 || step.depthwise(weight));
  need(step.way != Way::event || events, "no kernel runs this layer by events");
  return fired(step, {made[0], made[1], out, 0, x.is_static}, read);
}

Value pool(const Step& step, Value x) {
  const int64_t margin = step.padding[0], up = step.ceil ? step.stride - 1 : 0;
  need(2 * margin <= step.kernel, "padding must be at most half the window");
  need(!(step.ceil && step.op == Op::max_pool), "a maximum over windows that hang over");
  for (int64_t* side : {&x.height, &x.width}) {
    const int64_t room = *side + 2 * margin - step.kernel + up;
    need(room >= 0, "the window is larger than its input");
    int64_t made = room / step.stride + 1;
    if (step.ceil) made -= (made - 1) * step.stride >= *side + margin;  // no window starts behind the input
    need(made >= 1, "the window is larger than its input");
    *side = made;
  }
  if (step.op != Op::max_pool && step.kernel != 1) x.most = 0;
  return x;
}

Value affine(const Step& step, Value x, const Tensors& tensors) {
  need(step.op == Op::affine || (step.weight && !step.bias), "a division by nothing");
  std::vector<std::vector<int64_t>> sides{{x.height}, {x.width}, {x.channels}};
  for (const auto& name : {step.weight, step.bias}) {
    if (!name) continue;
    const Tensor& constant = tensors.at(*name);
    need(constant.type == Type::float32 && constant.shape.size() == 3 && constant.count > 0,
         "its constants are no float32 maps");
    for (size_t i = 0; i < 3; i++) sides[i].push_back(constant.shape[i]);
  }
  x.height = spread(sides[0]), x.width = spread(sides[1]), x.channels = spread(sides[2]);
  const bool fit = std::min({x.height, x.width, x.channels}) > 0 && std::max({x.height, x.width, x.channels}) <= SIZE;
  need(fit, "its constants do not fit the map");
  x.most = 0;
  return x;
}

Value join(const Step& step, const Values& read) {
  std::vector<int64_t> heights, widths, channels;
  int64_t sum = 0, product = 1, bound = 0, most = 0;
  bool spikes = true, steady = true, alike = true;
  for (const Value& value : read) {
    heights.push_back(value.height), widths.push_back(value.width), channels.push_back(value.channels);
    sum += value.most, most = std::max<int64_t>(most, value.most);
    if (step.op == Op::mul) product *= value.most;
    spikes = spikes && value.spikes(), steady = steady && value.is_static;
    alike = alike && value.height == read[0].height && value.width == read[0].width;
  }
  Value made{spread(heights), spread(widths), 0, 0, steady};
  need(made.height > 0 && made.width > 0 && (step.op != Op::cat || alike), "places differ");
  bound = most;
  if (step.op == Op::cat) {
    for (const int64_t count : channels) made.channels += count;
    need(made.channels <= SIZE, "more channels than a layer can have");
  } else {
    made.channels = spread(channels);
    need(read.size() == 2 && made.channels > 0, "channels differ");
    bound = step.op == Op::add ? sum : step.op == Op::mul ? product : 1;
  }
  need(step.op != Op::either || (spikes && most == 1), "`or` of what is not 0 or 1");
  made.most = spikes && bound <= 255 ? static_cast<int>(bound) : 0;
  need(std::max({made.height, made.width, made.channels}) <= SIZE, "its result is too large");
  return made;
}

Value attention(const Step& step, const Values& read) {
  for (const Value& value : read)
    need(value.same_shape(read[0]) && value.spikes() && !value.is_static, "q, k and v must be spikes of one shape");
  need(read[0].channels % step.heads == 0, "channels are no multiple of the heads");
  Value made = read[0];
  made.most = 0;
  return made;
}

Values infer(const Step& step, const Values& read, const Tensors& tensors) {
  Value x = read[0];
  switch (step.op) {
    case Op::conv: return conv(step, read, tensors);
    case Op::fire: need(!x.spikes(), "neurons fire on real values here"); return fired(step, x, read);
    case Op::max_pool:
    case Op::avg_pool: return {pool(step, x)};
    case Op::pad_channels: x.channels += step.before + step.behind; return {x};
    case Op::mean: x.height = x.width = 1, x.most = 0; return {x};
    case Op::flatten:
      need(x.size() <= SIZE, "more features than a layer can have");
      return {{1, 1, x.size(), x.most, x.is_static}};
    case Op::complement: need(x.most == 1, "the complement of what is not 0 or 1"); return {x};
    case Op::relu:
    case Op::sigmoid:
    case Op::clamp:
    case Op::scale:
    case Op::shift: x.most = 0; return {x};
    case Op::affine:
    case Op::divide: return {affine(step, x, tensors)};
    case Op::time_mean:
    case Op::time_sum:
    case Op::time_last:
      need(!x.is_static, "there are no steps to join");
      x.is_static = true;
      if (step.op != Op::time_last) x.most = 0;
      return {x};
    case Op::attention: return {attention(step, read)};
    default: return {join(step, read)};
  }
}

void check_step(const Step& step, const Tensors& tensors, Values& values) {
  for (const auto& name : {step.weight, step.factor, step.bias})
    if (name && !tensors.contains(*name)) refuse("the weight '" + *name + "' is missing");
  Values read;
  for (const int64_t index : step.reads) {
    need(index < static_cast<int64_t>(values.size()), "reads what no step before it makes");
    read.push_back(values[index]);
  }
  const Values made = infer(step, read, tensors);
  bool in_order = step.out.size() == made.size();
  for (size_t i = 0; in_order && i < made.size(); i++)
    in_order = step.out[i] == static_cast<int64_t>(values.size() + i);
  if (!in_order) refuse("its results must be values " + std::to_string(values.size()) + " and on");
  values.insert(values.end(), made.begin(), made.end());
}

}  // namespace

std::vector<Value> values_of(const Plan& plan, const Tensors& tensors) {
  Values values{plan.input};
  double elements = static_cast<double>(plan.input.size());
  for (const Step& step : plan.steps) {
    try {
      const size_t first = values.size();
      check_step(step, tensors, values);
      for (size_t i = first; i < values.size(); i++) elements += static_cast<double>(values[i].size());
      need(static_cast<double>(plan.T) * elements <= MOST_ELEMENTS, "more than 4294967296 elements for one image");
    } catch (const Refused& error) {
      refuse(step.layer + ": " + error.what());
    }
  }
  need(values.back().height == 1 && values.back().width == 1, "the last step must make logits, a map of one place");
  need(plan.per_step || values.back().is_static, "the last step must join the steps in time");
  return values;
}

Cost cost_of(const Plan& plan, const std::vector<Value>& values, const Tensors& tensors) {
  const auto steps = [&](int64_t i) { return values[i].is_static ? 1. : static_cast<double>(plan.T); };
  const auto size = [&](int64_t i) { return static_cast<double>(values[i].size()); };
  Cost cost;
  for (size_t i = 0; i < values.size(); i++) cost.bytes += steps(i) * static_cast<double>(values[i].bytes());
  for (const Step& step : plan.steps) {
    double n = 1, elements = 0, products = 0;
    for (const auto& touched : {step.reads, step.out})
      for (const int64_t i : touched) n = std::max(n, steps(i)), elements += size(i);
    const double made = size(step.out[0]);
    if (step.op == Op::conv) {
      const Tensor& weight = tensors.at(*step.weight);
      products = made * static_cast<double>(weight.count / weight.shape[0]);
      if (values[step.reads[0]].spikes()) cost.bytes += 4 * n * size(step.reads[0]);
    } else if (step.op == Op::max_pool || step.op == Op::avg_pool) {
      products = made * static_cast<double>(step.kernel * step.kernel);
    } else if (step.op == Op::attention) {
      products = 2 * made * static_cast<double>(values[step.out[0]].channels / step.heads);
    }
    cost.operations += n * (elements + products);
  }
  return cost;
}

std::vector<int64_t> places_of(const Plan& plan, const std::vector<Value>& values) {
  std::vector<int64_t> places(values.size()), last(values.size(), -1);
  std::vector<bool> kept(values.size());  // zeros around channels are written once, and wanted at every call
  for (size_t i = 0; i < values.size(); i++) places[i] = static_cast<int64_t>(i);
  for (size_t i = 0; i < plan.steps.size(); i++) {
    for (const int64_t index : plan.steps[i].reads) last[index] = static_cast<int64_t>(i);
    if (plan.steps[i].op == Op::pad_channels) kept[plan.steps[i].out[0]] = true;
  }
  const auto moves = [&](int64_t i) { return !values[i].spikes() && !values[i].is_static && !kept[i]; };
  for (size_t i = 0; i < plan.steps.size(); i++) {
    const Step& step = plan.steps[i];
    if (!step.residual || !step.keep_sum) continue;
    const int64_t residual = step.reads[1], sum = step.out[0];
    if (last[residual] == static_cast<int64_t>(i) && moves(residual) && moves(sum)) places[sum] = places[residual];
  }
  return places;
}

}  // namespace spikeloom::runtime
