// Norms with what follows them up to the codes of the next product, in one pass over memory or two (codes.py).
//
//     group    v = (x + t[b, c] - mean_g) / sqrt(var_g + eps) gamma[c] + beta[c],   SiLU(v) or v,   codes
//     layer    s = x + gate[b, c] y,   v = (s - mean) / sqrt(var + eps) gain[b, c] + shift[b, c],   codes; s is kept
//
// All in float32; x may be bfloat16, and what is stored float32, bfloat16 or codes. Sums of squares are of differences
// from the first pixel, or from the row's mean, so that a mean far from zero costs no digits. The bits do not depend on
// the number of threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <new>

#include "room.h"
#include "vectors.h"

namespace {

constexpr int64_t PIXELS = 64;   // summed in float32, before float64 takes over
constexpr int64_t VECTORS = 4;   // of channels, whose sums stay in registers
constexpr int64_t LEAST = 64;    // channels of a task: a cache line of codes

struct Group {
  const void* x;
  const float *added, *gamma, *beta;
  void* y;
  int64_t pixels, channels, group;
  float eps;
};

// Adds the sums over pixels `begin` to `end` of N vectors of channels, differences from `base`, and of their squares.
template <int32_t GIVEN, int N>
void add_sums(const void* x, int64_t start, int64_t stride, int64_t begin, int64_t end, int64_t some, const float* base,
              double* total, double* squares) {
  Reals from[N], s[N], s2[N];
  for (int v = 0; v < N; v++) {
    from[v] = load(base, FLOAT32, v * LANES, some);
    s[v] = s2[v] = Reals{};
  }
  for (int64_t p = begin; p < end; p++)
    for (int v = 0; v < N; v++) {
      const Reals d = load(x, GIVEN, start + p * stride + v * LANES, some) - from[v];
      s[v] += d;
      s2[v] += d * d;
    }
  for (int v = 0; v < N; v++)
    for (int64_t i = 0; i < some; i++) {
      total[v * LANES + i] += s[v][i];
      squares[v * LANES + i] += s2[v][i];
    }
}

// Factors a and b of `count` channels from `first` on, whole groups: the norm is x a + b.
template <int32_t GIVEN>
void group_factors(const Group& o, int64_t image, int64_t first, int64_t count, float* a, float* b, double* sums) {
  double *total = sums, *squares = sums + count;
  std::fill(sums, sums + 2 * count, 0.0);
  const int64_t start = image * o.pixels * o.channels + first, whole = count / LANES * LANES;
  for (int64_t c = 0; c < count; c += LANES) {
    const int64_t some = std::min(LANES, count - c);
    store<FLOAT32>(load(o.x, GIVEN, start + c, some), a, c, some, {});
  }
  for (int64_t begin = 0; begin < o.pixels; begin += PIXELS) {
    const int64_t end = std::min(o.pixels, begin + PIXELS);
    int64_t c = 0;
    const auto add = [&](auto vectors, int64_t some) {
      add_sums<GIVEN, vectors.value>(o.x, start + c, o.channels, begin, end, some, a + c, total + c, squares + c);
    };
    for (; c + VECTORS * LANES <= whole; c += VECTORS * LANES) add(std::integral_constant<int, VECTORS>{}, LANES);
    for (; c < whole; c += LANES) add(std::integral_constant<int, 1>{}, LANES);
    if (c < count) add(std::integral_constant<int, 1>{}, count - c);
  }
  const double size = static_cast<double>(o.pixels);
  for (int64_t g = 0; g < count; g += o.group) {
    double mean = 0, spread = 0;
    for (int64_t c = g; c < g + o.group; c++) {
      const double more = o.added ? o.added[image * o.channels + first + c] : 0.0;
      const double own = a[c] + total[c] / size + more;
      spread += squares[c] - total[c] * total[c] / size;
      total[c] = own;
      mean += own;
    }
    mean /= static_cast<double>(o.group);
    for (int64_t c = g; c < g + o.group; c++) spread += size * (total[c] - mean) * (total[c] - mean);
    const double inverse = 1.0 / std::sqrt(std::max(spread / (size * o.group), 0.0) + o.eps);
    for (int64_t c = g; c < g + o.group; c++) {
      const int64_t channel = first + c;
      const double more = o.added ? o.added[image * o.channels + channel] : 0.0;
      const double gain = inverse * o.gamma[channel];
      a[c] = static_cast<float>(gain);
      b[c] = static_cast<float>(o.beta[channel] + (more - mean) * gain);
    }
  }
}

template <int32_t GIVEN, int32_t KIND, bool SILU>
void group_apply(const Group& o, int64_t image, int64_t first, int64_t count, const float* a, const float* b,
                 const Grid& grid) {
  const int64_t whole = count / LANES * LANES;
  for (int64_t p = 0; p < o.pixels; p++) {
    const int64_t at = (image * o.pixels + p) * o.channels + first;
    const auto apply = [&](int64_t c, int64_t some) {
      Reals v = load(o.x, GIVEN, at + c, some) * load(a, FLOAT32, c, some) + load(b, FLOAT32, c, some);
      if constexpr (SILU) v = silu(v);
      store<KIND>(v, o.y, at + c, some, grid);
    };
    for (int64_t c = 0; c < whole; c += LANES) apply(c, LANES);
    if (whole < count) apply(whole, count - whole);
  }
}

template <int32_t GIVEN>
void group_norm(const Group& o, int64_t batch, bool with_silu, const Grid& grid) {
  // A task takes whole groups of one image, all of them where there are images enough: its pixels are then read in
  // their order, and once more while they are in the cache.
  const int64_t groups = o.channels / o.group, least = (LEAST + o.group - 1) / o.group;
  const int64_t shares = std::clamp<int64_t>((2 * at::get_num_threads() + batch - 1) / batch, 1, groups);
  const int64_t part = o.group * std::min(groups, std::max(least, (groups + shares - 1) / shares));
  const int64_t parts = (o.channels + part - 1) / part;
  at::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
    const Room<float> factors(2 * part);
    const Room<double> sums(2 * part);
    for (int64_t task = begin; task < end; task++) {
      const int64_t image = task / parts, first = task % parts * part, count = std::min(part, o.channels - first);
      float *a = factors.at, *b = factors.at + part;
      group_factors<GIVEN>(o, image, first, count, a, b, sums.at);
      by_kind(grid.kind, [&](auto kind) {
        if (with_silu)
          group_apply<GIVEN, kind.value, true>(o, image, first, count, a, b, grid);
        else
          group_apply<GIVEN, kind.value, false>(o, image, first, count, a, b, grid);
      });
    }
  });
}

struct Layer {
  const float* x;
  const void* added;
  int32_t kind;
  const float *gate, *gain, *shift;
  float* sum;
  void* y;
  int64_t tokens, channels;  // of a sample
  float eps;
};

inline float total(Reals a) {
  float s = 0;
  for (int64_t i = 0; i < LANES; i++) s += a[i];
  return s;
}

template <int32_t KIND>
void layer_row(const Layer& o, int64_t row, float* kept, const Grid& grid) {
  const int64_t at = row * o.channels, of_sample = row / o.tokens * o.channels;
  Reals s{}, s2{};
  for (int64_t c = 0; c < o.channels; c += LANES) {
    const int64_t some = std::min(LANES, o.channels - c);
    Reals v = load(o.x, FLOAT32, at + c, some);
    if (o.added) {
      v += load(o.added, o.kind, at + c, some) * (o.gate ? load(o.gate, FLOAT32, of_sample + c, some) : all(1.0f));
      store<FLOAT32>(v, o.sum, at + c, some, grid);
    }
    std::memcpy(kept + c, &v, sizeof v);
    s += v;
  }
  if (!o.y) return;
  const float mean = total(s) / static_cast<float>(o.channels);
  std::fill(kept + o.channels, kept + o.channels + LANES, mean);
  for (int64_t c = 0; c < o.channels; c += LANES) {
    const Reals d = load(kept, FLOAT32, c) - mean;
    s2 += d * d;
  }
  const float inverse = 1.0f / std::sqrt(total(s2) / static_cast<float>(o.channels) + o.eps);
  for (int64_t c = 0; c < o.channels; c += LANES) {
    const int64_t some = std::min(LANES, o.channels - c);
    const Reals gain = load(o.gain, FLOAT32, of_sample + c, some), shift = load(o.shift, FLOAT32, of_sample + c, some);
    store<KIND>((load(kept, FLOAT32, c) - mean) * inverse * gain + shift, o.y, at + c, some, grid);
  }
}

void layer_norm(const Layer& o, int64_t rows, const Grid& grid) {
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / o.channels), [&](int64_t begin, int64_t end) {
    const Room<float> kept(o.channels + LANES);
    by_kind(grid.kind, [&](auto kind) {
      for (int64_t row = begin; row < end; row++) layer_row<kind.value>(o, row, kept.at, grid);
    });
  });
}

}  // namespace

extern "C" int ptq4dm_group_norm(
    const void* x, int32_t kind, const float* added, const float* gamma, const float* beta, void* y, int64_t batch,
    int64_t pixels, int64_t channels, int64_t groups, float eps, int32_t with_silu, int32_t stored, float inverse,
    float zero, float low, float high) {
  try {
    const Group o{x, added, gamma, beta, y, pixels, channels, channels / groups, eps};
    const Grid grid{stored, inverse, zero, low, high};
    kind == FLOAT32 ? group_norm<FLOAT32>(o, batch, with_silu != 0, grid)
                    : group_norm<BFLOAT16>(o, batch, with_silu != 0, grid);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}

extern "C" void ptq4dm_codes(
    const void* x, int32_t kind, uint8_t* y, int64_t count, float inverse, float zero, float low, float high) {
  const Grid grid{CODES, inverse, zero, low, high};
  at::parallel_for(0, (count + LANES - 1) / LANES, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * LANES; at < std::min(count, end * LANES); at += LANES) {
      const int64_t some = std::min(LANES, count - at);
      store<CODES>(load(x, kind, at, some), y, at, some, grid);
    }
  });
}

extern "C" int ptq4dm_layer_norm(
    const float* x, const void* added, int32_t kind, const float* gate, const float* gain, const float* shift,
    float* sum, void* y, int64_t rows, int64_t tokens, int64_t channels, float eps, int32_t stored, float inverse,
    float zero, float low, float high) {
  try {
    layer_norm({x, added, kind, gate, gain, shift, sum, y, tokens, channels, eps}, rows,
               {stored, inverse, zero, low, high});
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
