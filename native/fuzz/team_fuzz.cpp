// Several callers share layers of random sizes: every piece is done once, and done before its caller goes on. Built
// with -fsanitize=thread.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "team.hpp"

namespace {

struct Layer {
  std::vector<int> done;
  int64_t turns;
};

void piece(const void* body, int64_t item) {
  Layer& layer = *static_cast<Layer*>(const_cast<void*>(body));
  volatile int64_t work = 0;
  for (int64_t i = 0; i < layer.turns; i++) work = work + i;
  layer.done[item]++;
}

bool layers_are_whole(unsigned seed, int calls) {
  std::mt19937 random(seed);
  for (int call = 0; call < calls; call++) {
    const int threads = 1 + static_cast<int>(random() % 4);
    const spikeloom::Awake awake(threads);
    for (unsigned i = random() % 30; i > 0; i--) {
      Layer layer{std::vector<int>(random() % 40), static_cast<int64_t>(random() % 2000)};
      spikeloom::share(static_cast<int64_t>(layer.done.size()), threads, piece, &layer);
      for (const int count : layer.done)
        if (count != 1) return false;
    }
    if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 4000));  // helpers sleep
  }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  const int calls = std::atoi(arguments[1]);
  std::vector<char> whole(3);
  std::vector<std::thread> callers;
  for (unsigned i = 0; i < whole.size(); i++) callers.emplace_back([&, i] { whole[i] = layers_are_whole(i, calls); });
  for (std::thread& caller : callers) caller.join();
  for (const char each : whole)
    if (!each) return std::printf("a piece was left out, done twice, or not done in time\n"), 1;
  std::printf("%d calls\n", calls);
}
