#pragma once

namespace discedit::cuda {

// Makes a device the current one, and the one before current again at the end. Throws std::runtime_error where there is
// no such device.
class OnDevice {
 public:
  OnDevice(int device, const char* op);
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice();

 private:
  int before_ = 0;
};

}  // namespace discedit::cuda
