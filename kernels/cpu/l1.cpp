// L1 normalization on codes on a CPU, forward and backward. What is computed stands in shift/l1_formula.py. Built by library.py.
//
// A row [P, C] is gone over again and again while it lies in a core's cache: for its peaks, the sums of its codes, the
// sums of those above the mean, and the result. What is done to one pixel's channels are functions of their own, for
// there a compiler sees that nothing overlaps, and makes vectors. Codes and sums are whole numbers: they are the same for
// all instructions and numbers of threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>

#include "room.h"

namespace {

constexpr float LIMIT = 127.0f, FAR = 1024.0f;
constexpr float WHOLE = 12582912.0f;  // 1.5 * 2^23: added and taken away it rounds to nearest even, as torch.round

struct Shape {
  int64_t rows, pixels, channels, groups;
  int64_t per() const { return channels / groups; }
  float size() const { return static_cast<float>(pixels * per()); }
};

inline int32_t bits_of(float x) {
  int32_t raw;
  std::memcpy(&raw, &x, 4);
  return raw & 0x7fffffff;  // NaN is the largest of all
}

// Between the bounds no product and sum become one operation, which would round once where torch rounds twice.
inline float within(float v, float most) {
  v = v > -most ? v : -most;  // std::max and std::min return references, of which no compiler makes vectors
  return v < most ? v : most;
}

// mix of shift/noise.py.
inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

#define APART __attribute__((noinline))  // where they are put into a loop, __restrict is forgotten

APART void raise_peaks(const float* __restrict x, int32_t* __restrict peaks, int64_t n) {
  for (int64_t c = 0; c < n; c++) {
    const int32_t bits = bits_of(x[c]);
    peaks[c] = peaks[c] > bits ? peaks[c] : bits;
  }
}

APART void nearest(const float* __restrict x, const float* __restrict inverse, int8_t* __restrict codes,
                   int32_t* __restrict sums, int64_t n) {
  for (int64_t c = 0; c < n; c++) {
    const int32_t q = static_cast<int32_t>(within((within(x[c] * inverse[c], FAR) + WHOLE) - WHOLE, LIMIT));
    codes[c] = static_cast<int8_t>(q);
    sums[c] += q;
  }
}

APART void count_above(const int8_t* __restrict codes, const float* __restrict middle, int32_t* __restrict number,
                       int32_t* __restrict sums, int64_t n) {
  for (int64_t c = 0; c < n; c++) {
    const int32_t q = codes[c], above = static_cast<float>(q) > middle[c] ? 1 : 0;
    number[c] += above;
    sums[c] += q * above;
  }
}

APART void spread_out(const int8_t* __restrict codes, const float* __restrict factor, const float* __restrict shift,
                      float* __restrict y, int64_t n) {
  for (int64_t c = 0; c < n; c++) y[c] = codes[c] * factor[c] + shift[c];
}

APART void stochastic(const float* __restrict dy, const float* __restrict inverse, const int8_t* __restrict q,
                      uint32_t place, uint32_t one, uint32_t two, int8_t* __restrict codes, int32_t* __restrict sums,
                      int32_t* __restrict products, int64_t n) {
  for (int64_t c = 0; c < n; c++) {
    const int32_t drawn = static_cast<int32_t>(mix(mix((place + static_cast<uint32_t>(c)) ^ one) + two) >> 16);
    const float noise = (static_cast<float>(drawn) + 0.5f) * 1.52587890625e-05f;
    const float v = within(dy[c] * inverse[c], FAR) + noise;
    const float near = (v + WHOLE) - WHOLE;  // std::floor, which GCC takes for a call here
    const int32_t code = static_cast<int32_t>(within(near > v ? near - 1.0f : near, LIMIT));
    codes[c] = static_cast<int8_t>(code);
    sums[c] += code;
    products[c] += code * q[c];
  }
}

APART void go_back(const int8_t* __restrict codes, const int8_t* __restrict q, const float* __restrict factor,
                   const float* __restrict middle, const float* __restrict everywhere, const float* __restrict more,
                   float* __restrict dx, int64_t n) {
  for (int64_t c = 0; c < n; c++) {
    const float off = static_cast<float>(q[c]) > middle[c] ? more[c] : 0.0f;
    dx[c] = codes[c] * factor[c] + everywhere[c] - off;
  }
}

struct Pair {
  float centre, pull;
};

// A group's sums of gamma t A and gamma t (s/D) (B - m A); without gamma they are added to by_gamma and by_beta.
APART Pair weigh(const int32_t* __restrict a, const int32_t* __restrict b, const float* __restrict gamma, float mean,
                 float step, float unit, float* __restrict by_gamma, float* __restrict by_beta, int64_t n) {
  constexpr int LANES = 8;  // side by side, for sums of floats have an order
  float centre[LANES] = {}, pull[LANES] = {};
  const auto add = [&](int64_t c, int lane) {
    const float beta = a[c] * step, slope = (b[c] - mean * a[c]) * (unit * step);
    by_gamma[c] += slope, by_beta[c] += beta;
    centre[lane] += gamma[c] * beta, pull[lane] += gamma[c] * slope;
  };
  int64_t c = 0;
  for (; c + LANES <= n; c += LANES)
    for (int lane = 0; lane < LANES; lane++) add(c + lane, lane);
  for (int lane = 0; c < n; c++, lane++) add(c, lane);
  Pair found{0, 0};
  for (int lane = 0; lane < LANES; lane++) found.centre += centre[lane], found.pull += pull[lane];
  return found;
}

// Steps of a row's groups, and their inverses for each channel.
void steps_of(const float* x, const Shape& s, int32_t* peaks, float* steps, float* inverse) {
  const int64_t channels = s.channels, per = s.per();
  std::fill(peaks, peaks + channels, 0);
  for (int64_t p = 0; p < s.pixels; p++) raise_peaks(x + p * channels, peaks, channels);
  for (int64_t g = 0; g < s.groups; g++) {
    int32_t most = 0;
    for (int64_t c = g * per; c < (g + 1) * per; c++) most = std::max(most, peaks[c]);
    float peak;
    std::memcpy(&peak, &most, 4);
    steps[g] = peak < std::numeric_limits<float>::min() * LIMIT ? 1.0f : peak / LIMIT;
    std::fill(inverse + g * per, inverse + (g + 1) * per, 1.0f / steps[g]);
  }
}

// One figure of each group from one of each channel.
template <typename T, typename U>
void together(const T* channels, const Shape& s, U* groups) {
  const int64_t per = s.per();
  for (int64_t g = 0; g < s.groups; g++) {
    U sum = 0;
    for (int64_t c = g * per; c < (g + 1) * per; c++) sum += channels[c];
    groups[g] = sum;
  }
}

struct Space {  // of a thread
  explicit Space(const Shape& s)
      : ints(3 * s.channels), floats(6 * s.channels), groups(3 * s.groups), sums(2 * s.groups) {}
  Room<int32_t> ints;
  Room<float> floats, groups;
  Room<int64_t> sums;
};

void normalize(const float* x, const float* gamma, const float* beta, const Shape& s, float floor, float ratio,
               float* y, int8_t* codes, float* stats, int64_t between, const Space& space) {
  const int64_t channels = s.channels, per = s.per();
  int32_t *peaks = space.ints.at, *first = peaks + channels, *second = first + channels;
  float *inverse = space.floats.at, *middle = inverse + channels;
  float *factor = middle + channels, *shift = factor + channels;
  float *steps = space.groups.at;
  int64_t *total = space.sums.at, *number = total + s.groups;
  steps_of(x, s, peaks, steps, inverse);
  std::fill(first, first + channels, 0);
  for (int64_t p = 0; p < s.pixels; p++)
    nearest(x + p * channels, inverse, codes + p * channels, first, channels);
  together(first, s, total);
  for (int64_t g = 0; g < s.groups; g++) {
    stats[g] = static_cast<float>(total[g]) / s.size();
    std::fill(middle + g * per, middle + (g + 1) * per, stats[g]);
  }
  std::fill(first, first + channels, 0);
  std::fill(second, second + channels, 0);
  for (int64_t p = 0; p < s.pixels; p++) count_above(codes + p * channels, middle, first, second, channels);
  together(first, s, number);
  together(second, s, total);
  for (int64_t g = 0; g < s.groups; g++) {
    const float mean = stats[g], higher = static_cast<float>(number[g]);
    const float spread = (static_cast<float>(total[g]) - mean * higher) * (2 * ratio / s.size()) * steps[g];
    const float width = spread < floor ? floor : spread, unit = steps[g] / width;
    stats[between + g] = unit;
    stats[2 * between + g] = width;
    stats[3 * between + g] = higher / s.size();
    stats[4 * between + g] = spread == width ? ratio / s.size() : 0.0f;
    for (int64_t c = g * per; c < (g + 1) * per; c++) {
      factor[c] = unit * gamma[c];
      shift[c] = beta[c] - mean * factor[c];
    }
  }
  for (int64_t p = 0; p < s.pixels; p++)
    spread_out(codes + p * channels, factor, shift, y + p * channels, channels);
}

// sums [2, C]: of the gradients by gamma and beta, of all rows before this one, too. from: the number of the row's first
// value.
void gradient(const float* dy, const int8_t* codes, const float* stats, int64_t between, const float* gamma, uint64_t seed,
              uint64_t from, const Shape& s, float* dx, int8_t* rounded, float* sums, const Space& space) {
  const int64_t channels = s.channels, per = s.per();
  int32_t *peaks = space.ints.at, *first = peaks + channels, *second = first + channels;
  float *inverse = space.floats.at, *middle = inverse + channels;
  float *factor = middle + channels, *everywhere = factor + channels;
  float *more = everywhere + channels, *steps = space.groups.at;
  const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  const uint32_t one = mix(low + mix(high)), two = mix(one + high);
  steps_of(dy, s, peaks, steps, inverse);
  std::fill(first, first + channels, 0);
  std::fill(second, second + channels, 0);
  for (int64_t p = 0; p < s.pixels; p++)
    stochastic(dy + p * channels, inverse, codes + p * channels, static_cast<uint32_t>(from + p * channels), one, two,
               rounded + p * channels, first, second, channels);
  for (int64_t g = 0; g < s.groups; g++) {
    const float mean = stats[g], unit = stats[between + g], width = stats[2 * between + g];
    const int64_t c = g * per;
    const Pair found = weigh(first + c, second + c, gamma + c, mean, steps[g], unit, sums + c, sums + channels + c, per);
    const float centre = found.centre / s.size(), pull = found.pull * stats[4 * between + g];
    std::fill(middle + c, middle + c + per, mean);
    for (int64_t i = c; i < c + per; i++) factor[i] = steps[g] / width * gamma[i];
    std::fill(everywhere + c, everywhere + c + per, (2 * stats[3 * between + g] * pull - centre) / width);
    std::fill(more + c, more + c + per, 2 * pull / width);
  }
  for (int64_t p = 0; p < s.pixels; p++)
    go_back(rounded + p * channels, codes + p * channels, factor, middle, everywhere, more, dx + p * channels, channels);
}

}  // namespace

// x, y [R, P, C], gamma and beta [C], stats [5, R, groups]: float32; codes int8 [R, P, C]. All contiguous, no size
// 0. Returns 0, or 1 where there was no memory.
extern "C" int ptq4dm_l1_norm(const float* x, const float* gamma, const float* beta, float* y, int8_t* codes, float* stats,
                              int64_t rows, int64_t pixels, int64_t channels, int64_t groups, float floor, float ratio) {
  const Shape s{rows, pixels, channels, groups};
  try {
    at::parallel_for(0, rows, std::max<int64_t>(1, 8192 / (pixels * channels)), [&](int64_t begin, int64_t end) {
      const Space space(s);
      for (int64_t r = begin; r < end; r++) {
        const int64_t at = r * pixels * channels;
        normalize(x + at, gamma, beta, s, floor, ratio, y + at, codes + at, stats + r * groups, rows * groups, space);
      }
    });
  } catch (const std::exception&) {  // it must not pass through a caller that knows nothing of C++
    return 1;
  }
  return 0;
}

// dy, dx [R, P, C], gamma [C], sums [parts, 2, C] of zeros: float32; each part has R / parts rows, rounded up.
extern "C" int ptq4dm_l1_gradient(const float* dy, const int8_t* codes, const float* stats, const float* gamma, int64_t seed,
                                  float* dx, float* sums, int64_t rows, int64_t pixels, int64_t channels, int64_t groups,
                                  int64_t parts) {
  const Shape s{rows, pixels, channels, groups};
  const int64_t share = (rows + parts - 1) / parts;
  try {
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      const Space space(s);
      const Room<int8_t> rounded(pixels * channels);
      for (int64_t r = begin * share; r < std::min(end * share, rows); r++) {
        const int64_t at = r * pixels * channels;
        gradient(dy + at, codes + at, stats + r * groups, rows * groups, gamma, static_cast<uint64_t>(seed),
                 static_cast<uint64_t>(at), s, dx + at, rounded.at, sums + r / share * 2 * channels, space);
      }
    });
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}
