// Splits independent items over threads. Each item is computed whole by one thread, and which one does not matter to
// the result.
#pragma once

#include <algorithm>
#include <cstdint>

namespace discedit {

// Calls run(context, begin, end) until [0, items) is covered, each time with a range that starts at a multiple of
// `chunk`, on up to `threads` threads. They come from the OpenMP runtime that is already in the process, if there is
// one: torch's workers keep spinning for a while after each op, and a second set of threads would fight them for the
// cores. Subnormal numbers count inside, whatever the caller has set. Rethrows what `run` throws.
void run_parallel(std::int64_t items, std::int64_t chunk, int threads,
                  void (*run)(const void* context, std::int64_t begin, std::int64_t end), const void* context);

template <typename Body>
void parallel_for(std::int64_t items, std::int64_t chunk, int threads, const Body& body) {
  run_parallel(
      items, std::max<std::int64_t>(1, chunk), threads,
      [](const void* context, std::int64_t begin, std::int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      &body);
}

}  // namespace discedit
