// Working memory that a thread keeps between calls: fresh pages would cost more than the work done in them.
#pragma once

#include <cstddef>

namespace discedit {

// `size` doubles, uninitialised, valid until this thread's next call with the same slot. At most 32 MiB per slot are
// kept; what is larger is given back by the next smaller request.
double* scratch(int slot, std::size_t size);

}  // namespace discedit
