// The current device of the calling thread.
#include "device.hpp"

#include "launch.hpp"

namespace discedit::cuda {

OnDevice::OnDevice(int device, const char* op) {
  check(op, cudaGetDevice(&before_));
  if (device != before_) check(op, cudaSetDevice(device));
  else before_ = -1;
}

OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace discedit::cuda
