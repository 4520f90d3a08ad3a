// CUDA's built-in vector types, with CUDA's sizes and alignments: CUDA C++ Programming Guide,
// "Built-in Vector Types". A wrong alignment here would hide misaligned accesses.
#pragma once

#define SIMT_VECTOR(T, name, align2, align4)                                   \
  struct alignas(align2) name##2 { T x, y; };                                  \
  struct name##3 { T x, y, z; };                                               \
  struct alignas(align4) name##4 { T x, y, z, w; };                            \
  inline constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

SIMT_VECTOR(signed char, char, 2, 4)
SIMT_VECTOR(unsigned char, uchar, 2, 4)
SIMT_VECTOR(short, short, 4, 8)
SIMT_VECTOR(unsigned short, ushort, 4, 8)
SIMT_VECTOR(int, int, 8, 16)
SIMT_VECTOR(unsigned, uint, 8, 16)
SIMT_VECTOR(float, float, 8, 16)
#undef SIMT_VECTOR

#define SIMT_VECTOR2(T, name)             \
  struct alignas(16) name##2 { T x, y; }; \
  inline constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }

SIMT_VECTOR2(long long, longlong)
SIMT_VECTOR2(unsigned long long, ulonglong)
SIMT_VECTOR2(double, double)
#undef SIMT_VECTOR2

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
