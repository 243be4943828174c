// Work in pieces, taken by whoever is free.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

namespace lcq {

// Does piece(0) .. piece(count - 1), on this thread and on others that `schedule` finds.
//
// The caller waits only for pieces that another thread has begun: if it is itself on the pool and no other thread is
// free, it does them all. A task that starts late finds nothing left, and touches nothing of the caller's.
template <typename Schedule>
void share(int64_t count, int64_t threads, std::function<void(int64_t)> piece, Schedule schedule) {
  struct State {
    std::function<void(int64_t)> piece;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::mutex lock;
    std::condition_variable all;
    int64_t done = 0;

    void work() {
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        piece(i);
        std::lock_guard<std::mutex> held(lock);
        if (++done == count) all.notify_one();
      }
    }
  };
  auto state = std::make_shared<State>();
  state->piece = std::move(piece);
  state->count = count;
  for (int64_t i = 1; i < threads && i < count; ++i) schedule([state] { state->work(); });
  state->work();
  std::unique_lock<std::mutex> held(state->lock);
  state->all.wait(held, [&] { return state->done == count; });
}

}  // namespace lcq
