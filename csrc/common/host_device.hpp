// Marks a function for host and device, so that one copy of the mathematics serves every back-end.
#pragma once

#if defined(__CUDACC__)
#define DISCEDIT_HD __host__ __device__
#else
#define DISCEDIT_HD
#endif
