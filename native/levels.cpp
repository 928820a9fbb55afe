#include "levels.hpp"

#ifndef _WIN32
#include <pthread.h>
#endif

namespace spikeloom {
namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found{&baseline::kernels};
#ifdef SPIKELOOM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    found.push_back(&avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      found.push_back(&avx512::kernels);
  }
#endif
  return found;
}

bool in_child = false;

#ifndef _WIN32
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { in_child = true; });
#endif

}  // namespace

const std::vector<const Kernels*>& levels() {
  static const std::vector<const Kernels*> all = supported();
  return all;
}

const Kernels*& active() {
  static const Kernels* chosen = levels().back();
  return chosen;
}

bool forked() { return in_child; }

}  // namespace spikeloom
