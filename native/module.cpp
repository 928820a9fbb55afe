// Python bindings: addresses and sizes in, nothing of PyTorch's ABI. Callers check shapes and keep tensors alive.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace nb = nanobind;
using namespace spikeloom;

namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> levels{&baseline::kernels};
#ifdef SPIKELOOM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    levels.push_back(&avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      levels.push_back(&avx512::kernels);
  }
#endif
  return levels;
}

const std::vector<const Kernels*> levels = supported();
const Kernels* active = levels.back();

void set_level(const std::string& name) {
  for (const Kernels* k : levels)
    if (name == k->level) {
      active = k;
      return;
    }
  throw std::invalid_argument("this processor has no instruction level " + name);
}

template <class T>
T* address(uintptr_t p) { return reinterpret_cast<T*>(p); }

void check(int code) {
  if (code == -1) throw std::bad_alloc();
  if (code != 0) throw std::logic_error("unknown kernel arguments");
}

Scan common(int dtype, int64_t steps, int64_t size, uintptr_t x, int64_t x_stride, uintptr_t v, float decay,
            float gain, float v_threshold, float v_rest, bool hard, int threads) {
  return {static_cast<Dtype>(dtype), steps, size, address<const void>(x), x_stride, address<const float>(v),
          decay, gain, v_threshold, v_rest, hard, threads};
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Fused kernels of spikeloom.ops; arguments are addresses, 0 for none.";
  m.def("levels", [] {
    std::vector<std::string> names;
    for (const Kernels* k : levels) names.emplace_back(k->level);
    return names;
  });
  m.def("level", [] { return std::string(active->level); });
  m.def("set_level", &set_level);
  m.def("openmp_threads", [] {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 0;
#endif
  });
  m.def("advise_huge", [](uintptr_t p, size_t bytes) {
#ifdef __linux__
    // A fresh tensor of many megabytes costs more in page faults than the scan that fills it; with large pages, a
    // fraction of it. Only a hint: a system that does not grant it loses nothing.
    constexpr uintptr_t page = uintptr_t{2} << 20;
    const uintptr_t first = (p + page - 1) / page * page, last = (p + bytes) / page * page;
    if (last > first) madvise(address<void>(first), last - first, MADV_HUGEPAGE);
#endif
  });
  m.def("scan_forward",
        [](int dtype, int64_t steps, int64_t size, uintptr_t x, int64_t x_stride, uintptr_t v, float decay, float gain,
           float v_threshold, float v_rest, bool hard, int threads, uintptr_t spikes, uintptr_t v_out,
           uintptr_t potentials) {
          ScanForward a{common(dtype, steps, size, x, x_stride, v, decay, gain, v_threshold, v_rest, hard, threads),
                        address<void>(spikes), address<float>(v_out), address<float>(potentials)};
          nb::gil_scoped_release release;
          check(active->scan_forward(a));
        });
  m.def("scan_backward",
        [](int dtype, int64_t steps, int64_t size, uintptr_t x, int64_t x_stride, uintptr_t v, float decay, float gain,
           float v_threshold, float v_rest, bool hard, int threads, uintptr_t grad_spikes, uintptr_t grad_v_out,
           uintptr_t slope, int surrogate, float p, float q, bool detach_reset, uintptr_t grad_x, uintptr_t grad_v,
           uintptr_t grad_constants) {
          ScanBackward a{common(dtype, steps, size, x, x_stride, v, decay, gain, v_threshold, v_rest, hard, threads),
                         address<const void>(grad_spikes), address<const float>(grad_v_out), address<const float>(slope),
                         static_cast<Surrogate>(surrogate), p, q, detach_reset, address<void>(grad_x),
                         address<float>(grad_v), address<double>(grad_constants)};
          nb::gil_scoped_release release;
          check(active->scan_backward(a));
        });
}
