#include "scratch.hpp"

#include <memory>

namespace discedit {

double* scratch(int slot, std::size_t size) {
  constexpr std::size_t kept = (std::size_t{32} << 20) / sizeof(double);
  struct Buffer {
    std::unique_ptr<double[]> data;
    std::size_t size = 0;
  };
  thread_local Buffer buffers[2];
  Buffer& buffer = buffers[slot];
  if (buffer.size < size || (buffer.size > kept && size <= kept)) {
    buffer.data.reset();
    buffer.size = 0;
    buffer.data.reset(new double[size]);
    buffer.size = size;
  }
  return buffer.data.get();
}

}  // namespace discedit
