// The threads that share an engine's work, under a sanitizer for threads: many callers at the same time, works of many
// sizes, pauses in which the workers fall asleep.
//
//     cmake -S native -B build -DSPIKELOOM_FUZZ=ON && cmake --build build --target workers_stress
//     build/workers_stress 2000
//
// The process ends with 1 where a piece runs twice, or not at all, or after its caller went on.
#include "../engine/workers.hpp"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

namespace {

struct Work {
  std::vector<int> counts;  // plain: whoever runs a piece must see what the caller wrote, and the caller what it wrote
  int sleepy;
};

bool call(std::mt19937& generator) {
  const auto from_to = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); };
  const bool many = from_to(0, 200) == 0;
  Work work{std::vector<int>(many ? from_to(65'500, 131'100) : from_to(0, 40), 1), from_to(0, 19)};
  spikeloom::share_pieces(static_cast<int64_t>(work.counts.size()), from_to(1, 6), [](const void* body, int64_t piece) {
    Work& work = *static_cast<Work*>(const_cast<void*>(body));
    if (work.sleepy == 0 && piece % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
    work.counts[piece] *= 3;
  }, &work);
  for (const int count : work.counts)
    if (count != 3) return false;
  if (from_to(0, 9) == 0) std::this_thread::sleep_for(std::chrono::microseconds(from_to(1, 300)));
  return true;
}

// A caller whose helper is at another's piece goes on alone.
bool waits_for_nobody() {
  static std::atomic<int> begun{0};
  static std::atomic<bool> over{false};
  const auto sleep = [](const void*, int64_t) {
    begun++;
    while (!over) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  std::thread other([&] { spikeloom::share_pieces(2, 2, sleep, nullptr); });
  while (begun < 2) std::this_thread::yield();  // the only worker and its caller
  std::atomic<int> ran{0};
  spikeloom::share_pieces(
      10, 2, [](const void* ran, int64_t) { ++*static_cast<std::atomic<int>*>(const_cast<void*>(ran)); }, &ran);
  over = true;
  other.join();
  return ran == 10;
}

}  // namespace

int main(int, char** arguments) {
  const int calls = std::atoi(arguments[1]);
  std::atomic<bool> right{waits_for_nobody()};  // else it hangs
  std::vector<std::thread> callers;
  for (unsigned seed = 0; seed < 40; seed++)  // more than have a place
    callers.emplace_back([&right, calls, seed] {
      std::mt19937 generator(seed);
      for (int i = 0; i < calls / 40; i++)
        if (!call(generator)) right = false;
    });
  for (std::thread& caller : callers) caller.join();
  std::puts(right ? "every piece ran once" : "a piece did not run once");
  return right ? 0 : 1;
}
