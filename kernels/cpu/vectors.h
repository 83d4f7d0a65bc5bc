// Vectors of as many values as the registers hold that a file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#else
constexpr int64_t LANES = 8;
#endif
using Reals = float __attribute__((vector_size(4 * LANES)));
using Whole = int32_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
using Codes = uint8_t __attribute__((vector_size(LANES)));

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, CODES = 2 };  // of what values are stored as

inline Reals all(float a) { return Reals{} + a; }

// Copies `count` of at most LANES values; all of them in one instruction.
template <typename T>
inline void copy(void* to, const void* from, int64_t count) {
  if (count == LANES)
    std::memcpy(to, from, LANES * sizeof(T));
  else
    std::memcpy(to, from, count * sizeof(T));
}

// `count` values from p, at most LANES; the rest is 0. Of float32 or bfloat16.
inline Reals load(const void* p, int32_t kind, int64_t at, int64_t count = LANES) {
  if (kind == FLOAT32) {
    Reals a{};
    copy<float>(&a, static_cast<const float*>(p) + at, count);
    return a;
  }
  Halves h{};
  copy<uint16_t>(&h, static_cast<const uint16_t*>(p) + at, count);
  const Whole bits = __builtin_convertvector(h, Whole) << 16;
  return (Reals)bits;
}

inline Reals nearest(Reals a) {  // whole numbers, ties to even, below 2^22
  const float magic = 12582912.0f;
  return (a + magic) - magic;
}

inline Reals least(Reals a, Reals b) { return a < b ? a : b; }
inline Reals most(Reals a, Reals b) { return a > b ? a : b; }

// e^a for a <= 88, within 2 units of the last place; what lies below -87 gives e^-87.
inline Reals exponential(Reals a) {
  a = most(a, all(-87.0f));
  const Reals n = nearest(a * 1.44269504088896341f);
  const Reals r = (a - n * 0.693359375f) - n * -2.12194440e-4f;
  Reals p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Whole power = (__builtin_convertvector(n, Whole) + 127) << 23;
  return p * (Reals)power;
}

inline Reals silu(Reals a) { return a / (exponential(least(-a, all(88.0f))) + 1.0f); }

// How values are stored: as they are, in bfloat16, or as code = clamp(round(a inverse) + zero, low, high).
struct Grid {
  int32_t kind;
  float inverse, zero, low, high;
};

template <int32_t KIND>
inline void store(Reals a, void* p, int64_t at, int64_t count, const Grid& grid) {
  if constexpr (KIND == FLOAT32) {
    copy<float>(static_cast<float*>(p) + at, &a, count);
  } else if constexpr (KIND == BFLOAT16) {
    const Whole bits = (Whole)a;
    const Whole rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Whole kept = a == a ? rounded : Whole{} + 0x7FC0;
    const Halves h = __builtin_convertvector(kept, Halves);
    copy<uint16_t>(static_cast<uint16_t*>(p) + at, &h, count);
  } else {
    Reals q = a * grid.inverse;
    q = q == q ? q : Reals{};  // NaN has no code
    q = nearest(least(most(q, all(-1e6f)), all(1e6f))) + grid.zero;
    q = least(most(q, all(grid.low)), all(grid.high));
    const Codes codes = __builtin_convertvector(__builtin_convertvector(q, Whole), Codes);
    copy<uint8_t>(static_cast<uint8_t*>(p) + at, &codes, count);
  }
}

template <typename Function>
void by_kind(int32_t kind, const Function& function) {
  if (kind == FLOAT32)
    function(std::integral_constant<int32_t, FLOAT32>{});
  else if (kind == BFLOAT16)
    function(std::integral_constant<int32_t, BFLOAT16>{});
  else
    function(std::integral_constant<int32_t, CODES>{});
}

}  // namespace
