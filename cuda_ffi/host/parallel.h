// A loop over XLA's thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace jfp4::host {

// Calls work(i) for every i from 0 to count - 1, on this thread and on the pool's. Returns when all
// are done, or throws the first exception that one has thrown. This thread takes items as the
// others do, so that nothing waits for a busy pool.
template <typename Work>
void ParallelFor(xla::ffi::ThreadPool pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
    std::exception_ptr error;
  };
  // Shared, since a helper may start only when all is done; it touches `work` only if there is an
  // item left, for which this thread waits.
  const auto state = std::make_shared<State>();
  const auto run = [state, count, &work] {
    int64_t items = 0;
    std::exception_ptr error;
    for (int64_t i; (i = state->next.fetch_add(1)) < count; ++items) {
      try {
        work(i);
      } catch (...) {  // others still have the caller's variables: the item counts as done
        if (!error) error = std::current_exception();
      }
    }
    if (items == 0) return;
    const std::lock_guard<std::mutex> lock(state->mutex);
    if (!state->error) state->error = error;
    state->done += items;
    if (state->done == count) state->all_done.notify_all();
  };
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([run] { run(); });
  run();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == count; });
  if (state->error) std::rethrow_exception(state->error);
}

}  // namespace jfp4::host
