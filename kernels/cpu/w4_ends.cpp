// What lies before and after a product of codes with 4-bit weights (w4a8.cpp). Codes of inputs under smoothing, in one
// pass over them:
//
//     v[m, k] = (x[m, k] + c) / s[k]
//     8 bits      q = round(v / t),        t[m] = max_k |v| / 127
//     4 bits      q = round(v (1 / t)),    t[g, m] = max_{k in g} |v| / 7;  where c > 0 without sign, max v / 15
//
// Rounded as formats/int4.py and w4/reference.py have it, to the bit: halves to even, a scale that would be no normal
// number is 1. NaN and infinity have the code 0, under a scale that is the NaN or the infinity. GELU of outputs,
// in place:
//
//     y (1 + tanh u) / 2 = y / (1 + e^-2u),    u = (2 / pi)^(1/2) (y + 0.044715 y^3)

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>

#include "room.h"
#include "vectors.h"

namespace {

struct Form {
  int64_t k, size;  // inputs of a row, and those under one scale
  const float* smooth;
  float shift;
  bool four, positive;  // bits; codes without sign
};

// function(i, count) for i from 0 on in steps of LANES: whole vectors, then what is left.
template <typename Function>
inline void by_vectors(int64_t count, const Function& function) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) function(i, LANES);
  if (i < count) function(i, count - i);
}

// The scale of `count` values: of the largest bits without sign, among which those of NaN are the largest.
float scale_of(const float* v, int64_t count, const Form& form) {
  const Reals none{};
  Whole peaks{};
  by_vectors(count, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
    Reals a = load(v, FLOAT32, i, some);
    if (form.positive) a = a < none ? none : a;
    const Whole raw = (Whole)a & 0x7fffffff;
    peaks = raw > peaks ? raw : peaks;
  });
  int32_t most = 0;
  for (int64_t i = 0; i < LANES; i++) most = std::max<int32_t>(most, peaks[i]);
  float peak;
  std::memcpy(&peak, &most, 4);
  const float scale = peak / (form.four ? form.positive ? 15.0f : 7.0f : 127.0f);
  return scale < 1.17549435e-38f ? 1.0f : scale;
}

void round(const float* v, int64_t count, float scale, const Form& form, int8_t* codes) {
  const float high = form.four ? form.positive ? 15.0f : 7.0f : 127.0f, low = form.positive ? 0.0f : -high;
  const float inverse = 1.0f / scale;
  by_vectors(count, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
    const Reals a = load(v, FLOAT32, i, some);
    Reals q = form.four ? a * inverse : a / scale;
    q = q == q ? q : Reals{};
    q = nearest(least(most(q, all(low)), all(high)));
    const auto bytes = __builtin_convertvector(__builtin_convertvector(q, Whole), Codes);
    copy<int8_t>(codes + i, &bytes, some);
  });
}

// v of a row, float32.
void smoothed(const float* x, const Form& form, float* v) {
  const Grid as_it_is{FLOAT32, 0, 0, 0, 0};
  by_vectors(form.k, [&](int64_t i, int64_t some) __attribute__((always_inline)) {
    Reals a = load(x, FLOAT32, i, some) + form.shift;
    if (form.smooth) a = a / load(form.smooth, FLOAT32, i, some);
    store<FLOAT32>(a, v, i, some, as_it_is);
  });
}

Reals gelu_tanh(Reals y) {
  const Reals u = (y + y * y * y * 0.044715f) * -1.59576912160573f;
  return y / (exponential(least(u, all(88.0f))) + 1.0f);
}

}  // namespace

// x [M, K], smooth [K] or null: float32; codes int8 [M, K]; scales float32 [K / size, M]. four: 4 bits, `positive` ones
// without sign. Returns 0, or 1 where there was no memory. All contiguous, no size 0. The caller has checked all sizes.
extern "C" int ptq4dm_inputs(
    const float* x, const float* smooth, float shift, int8_t* codes, float* scales, int64_t m, int64_t k, int64_t size,
    int32_t four, int32_t positive) {
  const Form form{k, size, smooth, shift, four != 0, positive != 0};
  try {
    at::parallel_for(0, m, std::max<int64_t>(1, 32768 / k), [&](int64_t begin, int64_t end) {
      const Room<float> v(k);
      for (int64_t i = begin; i < end; i++) {
        smoothed(x + i * k, form, v.at);
        for (int64_t g = 0; g < k / size; g++) {
          const float scale = scale_of(v.at + g * size, size, form);
          scales[g * m + i] = scale;
          round(v.at + g * size, size, scale, form, codes + i * k + g * size);
        }
      }
    });
  } catch (const std::exception&) {  // it must not pass through a caller that knows nothing of C++
    return 1;
  }
  return 0;
}

// y [count] float32, in place.
extern "C" void ptq4dm_gelu_tanh(float* y, int64_t count) {
  const Grid as_it_is{FLOAT32, 0, 0, 0, 0};
  at::parallel_for(0, (count + LANES - 1) / LANES, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * LANES; i < std::min(count, end * LANES); i += LANES) {
      const int64_t some = std::min(LANES, count - i);
      store<FLOAT32>(gelu_tanh(load(y, FLOAT32, i, some)), y, i, some, as_it_is);
    }
  });
}
