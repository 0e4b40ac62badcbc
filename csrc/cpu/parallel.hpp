// Splits independent work over threads. Each item is computed whole by one thread, so results do not depend on how
// many.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace discedit {

// Calls body(begin, end) on at most `threads` consecutive ranges of [0, items), each of at least `grain` items.
template <typename Body>
void parallel_for(std::int64_t items, std::int64_t grain, int threads, const Body& body) {
  const std::int64_t most = std::max<std::int64_t>(1, items / std::max<std::int64_t>(1, grain));
  const std::int64_t parts = std::min<std::int64_t>(std::max(threads, 1), most);
  if (parts == 1) {
    if (items > 0) body(std::int64_t{0}, items);
    return;
  }
  std::vector<std::exception_ptr> failures(static_cast<std::size_t>(parts));
  std::vector<std::thread> workers;
  workers.reserve(static_cast<std::size_t>(parts - 1));
  const auto run = [&](std::int64_t part) {
    try {
      body(items * part / parts, items * (part + 1) / parts);
    } catch (...) {
      failures[static_cast<std::size_t>(part)] = std::current_exception();
    }
  };
  std::int64_t started = 1;
  try {
    for (; started < parts; ++started) workers.emplace_back(run, started);
  } catch (...) {  // no more threads to be had: this one does the rest
  }
  run(0);
  for (std::int64_t part = started; part < parts; ++part) run(part);
  for (std::thread& worker : workers) worker.join();
  for (const std::exception_ptr& failure : failures)
    if (failure) std::rethrow_exception(failure);
}

}  // namespace discedit
