// A CUDA stream, without CUDA's headers.
#pragma once

struct CUstream_st;

namespace discedit::cuda {

using Stream = CUstream_st*;  // a cudaStream_t

}  // namespace discedit::cuda
