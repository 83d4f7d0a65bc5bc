// W4A8 Linear and convolutions on a CPU, from packed 4-bit weights: sums of whole numbers in each group, exact, then
// floats.
//
//     P[m, n, g] = sum_{k in g} (q_x[m, k] - z_x) (q[n, k] - z[n, g])
//     y[m, n] = s_x[m] sum_g s_w[n, g] P[m, n, g]  +  b[n]                scales of groups: float32, g ascending
//     y[m, n] = s_x[m] s_w[n] sum_g s_1[n, g] P[m, n, g]  +  b[n]         one scale a row (s_1 = 1), or whole steps s_1
//     y[m, n] = sum_g s_w[n, g] (s_x[m, g] P[m, n, g])  +  b[n]           inputs in groups, too: as scales of groups
//
// The instructions that multiply bytes (vpdpbusd; vpmaddubsw before AVX-512 VNNI) want one operand without sign. It is
// the weight: its nibble u = q + 8 lies in 0..15, so that pairs of products fit 16 bits and nothing saturates. Then
//
//     P = sum q_x u  -  (8 + z) sum q_x  +  z_x ((8 + z) |g| - sum u)
//
// where sum q_x is one number of a row and group, and sum u is needed under a zero point of the inputs alone.
//
// A task takes WIDE outputs: it unpacks a part of their rows at a time, into at most 128 KiB that stay in the cache of
// its core, in the order in which the instructions read them, [k / 4][WIDE][4 bytes], and multiplies all rows of x with
// it. No order of sums depends on the number of threads, of rows or on the part's size, so neither do the bits of y.

#include <ATen/Parallel.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>

#include "room.h"

namespace {

constexpr int64_t RUN = 64;     // inputs packed together: byte j of 32 has inputs j (low) and j + 32 (high)
constexpr int64_t BLOCK = 32;   // inputs that AVX2 sums in 16 bits: 16 products of at most 15 * 128
// Inputs unpacked at a time, for few rows of x and for many. Where a row has one scale there are fewer tables to fill,
// and few inputs at a time leave room in the first cache; UNIT of them are summed at a time for many rows.
constexpr int64_t FEW = 512, FEW_OF_ROWS = 128, MANY = 2048, UNIT = 512;
constexpr int64_t MOST_GROUPS = MANY / 32;
constexpr int64_t AHEAD = 256;  // bytes of a row
constexpr int64_t GATHERED = 1 << 20, LEAST_ROWS = 240;  // of windows at a time: bytes, and rows at least

#if defined(__AVX512VNNI__)
using Ints = __m512i;
using Floats = __m512;
constexpr int LANES = 16, VECTORS = 4, ROWS = 6;
inline Ints zeros() { return _mm512_setzero_si512(); }
inline Ints load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Ints a) { _mm512_storeu_si512(p, a); }
inline Ints repeat(int32_t a) { return _mm512_set1_epi32(a); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Floats floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Floats as_floats(Ints a) { return _mm512_castsi512_ps(a); }
inline Ints as_ints(Floats a) { return _mm512_castps_si512(a); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats multiply(Floats a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
inline Ints low_nibbles(Ints a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
inline Ints high_nibbles(Ints a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
// In assembly, for gcc 12 keeps the 24 sums of `sum_products` in memory where it sees the intrinsic.
inline Ints add_products(Ints a, Ints u, Ints q) {
  asm("vpdpbusd %2, %1, %0" : "+v"(a) : "v"(u), "v"(q));
  return a;
}

// 8 vectors of 16 rows' words 0..7, from their 32 bytes each.
inline void transposed(const uint8_t* const* row, int64_t at, Ints out[8]) {
  Ints r[8];
  for (int i = 0; i < 8; i++) {
    const int first = i < 4 ? i : i + 4;
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row[first] + at));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row[first + 4] + at));
    r[i] = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  }
  Ints u[2][4];
  for (int h = 0; h < 2; h++) {
    const Ints *s = r + 4 * h;
    const Ints a = _mm512_unpacklo_epi32(s[0], s[1]), b = _mm512_unpackhi_epi32(s[0], s[1]);
    const Ints c = _mm512_unpacklo_epi32(s[2], s[3]), d = _mm512_unpackhi_epi32(s[2], s[3]);
    u[h][0] = _mm512_unpacklo_epi64(a, c);
    u[h][1] = _mm512_unpackhi_epi64(a, c);
    u[h][2] = _mm512_unpacklo_epi64(b, d);
    u[h][3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; i++) {
    out[i] = _mm512_shuffle_i64x2(u[0][i], u[1][i], 0x88);
    out[i + 4] = _mm512_shuffle_i64x2(u[0][i], u[1][i], 0xDD);
  }
}
#elif defined(__AVX2__) && defined(__FMA__)
using Ints = __m256i;
using Floats = __m256;
constexpr int LANES = 8, VECTORS = 2, ROWS = 4;
inline Ints zeros() { return _mm256_setzero_si256(); }
inline Ints load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, Ints a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline Ints repeat(int32_t a) { return _mm256_set1_epi32(a); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints multiply(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
inline Floats floats(Ints a) { return _mm256_cvtepi32_ps(a); }
inline Floats as_floats(Ints a) { return _mm256_castsi256_ps(a); }
inline Ints as_ints(Floats a) { return _mm256_castps_si256(a); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats multiply(Floats a, float b) { return _mm256_mul_ps(a, _mm256_set1_ps(b)); }
inline Ints low_nibbles(Ints a) { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
inline Ints high_nibbles(Ints a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
inline Ints add_products(Ints a, Ints u, Ints q) {  // of 16 bits; in assembly for the same reason
  Ints pairs;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(a), "=&x"(pairs) : "x"(u), "x"(q));
  return a;
}

// 8 vectors of 8 rows' words 0..7, from their 32 bytes each.
inline void transposed(const uint8_t* const* row, int64_t at, Ints out[8]) {
  Ints u[2][4];
  for (int h = 0; h < 2; h++) {
    Ints s[4];
    for (int i = 0; i < 4; i++) s[i] = load(row[4 * h + i] + at);
    const Ints a = _mm256_unpacklo_epi32(s[0], s[1]), b = _mm256_unpackhi_epi32(s[0], s[1]);
    const Ints c = _mm256_unpacklo_epi32(s[2], s[3]), d = _mm256_unpackhi_epi32(s[2], s[3]);
    u[h][0] = _mm256_unpacklo_epi64(a, c);
    u[h][1] = _mm256_unpackhi_epi64(a, c);
    u[h][2] = _mm256_unpacklo_epi64(b, d);
    u[h][3] = _mm256_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; i++) {
    out[i] = _mm256_permute2x128_si256(u[0][i], u[1][i], 0x20);
    out[i + 4] = _mm256_permute2x128_si256(u[0][i], u[1][i], 0x31);
  }
}
#else
#error "needs AVX-512 VNNI, or AVX2 and FMA"
#endif

constexpr int WIDE = LANES * VECTORS;

// Where scales are: one a row; of groups; of groups of weight and inputs; of rows, with whole steps of groups.
enum class Kind { ROWS, GROUPS, BOTH, STEPS };
constexpr bool in_groups(Kind kind) { return kind == Kind::GROUPS || kind == Kind::BOTH; }

// acc[r][v] = sums of products of `blocks` times BLOCK inputs, of R rows of x with the outputs of VECTORS vectors.
template <int R>
inline void sum_products(const int8_t* x, int64_t stride, const uint8_t* w, int64_t blocks, Ints (&acc)[R][VECTORS]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) acc[r][v] = zeros();
  for (int64_t block = 0; block < blocks; block++) {
#if defined(__AVX512VNNI__)
    auto& sums = acc;
#else
    Ints sums[R][VECTORS];  // of 16 bits
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) sums[r][v] = zeros();
#endif
    for (int step = 0; step < BLOCK / 4; step++, x += 4, w += WIDE * 4) {
      Ints u[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) u[v] = load(w + v * LANES * 4);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        int32_t four;
        std::memcpy(&four, x + r * stride, 4);
        const Ints q = repeat(four);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) sums[r][v] = add_products(sums[r][v], u[v], q);
      }
    }
#if !defined(__AVX512VNNI__)
    const Ints ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) acc[r][v] = add(acc[r][v], _mm256_madd_epi16(sums[r][v], ones));
#endif
  }
}

// What a task holds of its outputs' rows: codes of a part of K, and numbers of its groups.
struct Tile {
  uint8_t* codes;    // [k / 4][WIDE][4]
  int32_t* offsets;  // [groups][WIDE]: 8 + z
  int32_t* bases;    // [groups][WIDE]: z_x ((8 + z) |g| - sum u)
  int32_t* factors;  // [groups][WIDE]: steps, or the bits of float scales
};

// What multiplies sums of inputs' rows: their codes, the sums of these in groups, and scales of groups (of BOTH), each
// with the step to the next row; scales of the next group are x_groups farther.
struct Inputs {
  const int8_t* codes;
  int64_t stride;
  const int32_t* sums;
  int64_t sums_stride;
  const float* scales;
  int64_t x_groups;
};

// total[r][WIDE] += the part's share of R rows: int32 sums, or the bits of float32 ones. PLAIN: no zero points, and
// no steps.
template <Kind KIND, bool PLAIN, int R>
__attribute__((noinline)) void multiply_rows(
    const Inputs& x, const Tile& tile, int64_t inputs, int64_t length, int32_t* total) {
  const uint8_t* w = tile.codes;
  for (int64_t g = 0, k = 0; k < inputs; g++, k += length, w += length * WIDE) {
    Ints acc[R][VECTORS];
    sum_products<R>(x.codes + k, x.stride, w, std::min(length, inputs - k) / BLOCK, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Ints sum = repeat(x.sums[r * x.sums_stride + g] * (PLAIN ? -8 : -1));
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) {
        const int64_t at = g * WIDE + v * LANES;
        Ints found = add(acc[r][v], PLAIN ? sum : multiply(sum, load(tile.offsets + at)));
        if constexpr (!PLAIN) found = add(found, load(tile.bases + at));
        int32_t* place = total + r * WIDE + v * LANES;
        if constexpr (in_groups(KIND)) {
          Floats value = floats(found);
          if constexpr (KIND == Kind::BOTH) value = multiply(value, x.scales[g * x.x_groups + r]);
          found = as_ints(multiply_add(as_floats(load(tile.factors + at)), value, as_floats(load(place))));
        } else if constexpr (KIND == Kind::STEPS)
          found = add(load(place), multiply(found, load(tile.factors + at)));
        else
          found = add(load(place), found);
        store(place, found);
      }
    }
  }
}

template <Kind KIND, bool PLAIN, int R = ROWS>
void multiply_some(
    int64_t rows, const Inputs& x, const Tile& tile, int64_t inputs, int64_t length, int32_t* total) {
  if (rows == R)
    multiply_rows<KIND, PLAIN, R>(x, tile, inputs, length, total);
  else if constexpr (R > 1)
    multiply_some<KIND, PLAIN, R - 1>(rows, x, tile, inputs, length, total);
}

void add_up(const int8_t* codes, int64_t wide, int32_t* sums, int64_t length, int64_t groups) {
  for (int64_t g = 0; g < groups; g++) {
    int32_t sum = 0;
    const int64_t end = std::min(wide, (g + 1) * length);
    for (int64_t i = g * length; i < end; i++) sum += codes[i];
    sums[g] = sum;
  }
}

// The codes of a row of x, filled up with the zero point, its scale, and the sums of its codes in each group.
void quantize(
    const float* x, int64_t k, int64_t wide, float given, int32_t zero, int32_t bits, int8_t* codes, float* scale,
    int32_t* sums, int64_t length, int64_t groups) {
  const int32_t limit = 1 << (bits - 1);
  float step = given;
  if (step < 0) {  // dynamic: symmetric, by the largest value; as bits of an int32, NaN is the largest of all
    int32_t peak = 0;
    for (int64_t i = 0; i < k; i++) {
      int32_t raw;
      std::memcpy(&raw, x + i, 4);
      peak = std::max(peak, raw & 0x7fffffff);
    }
    std::memcpy(&step, &peak, 4);
    step = step / static_cast<float>(limit - 1);
    if (step < 1.17549435e-38f) step = 1.0f;
  }
  *scale = step;
  const float inverse = static_cast<float>(1.0 / static_cast<double>(step));
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers, halves to even
  const int32_t first = -limit - zero, last = limit - 1 - zero;
  for (int64_t i = 0; i < k; i++) {
    float v = x[i] * inverse;
    v = v == v ? v : 0.0f;
    v = v > 512.0f ? 512.0f : v;
    v = v < -512.0f ? -512.0f : v;
    const float whole = v + magic;
    int32_t code;
    std::memcpy(&code, &whole, 4);
    code -= 0x4B400000;
    code = code < first ? first : code;
    code = code > last ? last : code;
    codes[i] = static_cast<int8_t>(code + zero);
  }
  std::memset(codes + k, static_cast<uint8_t>(static_cast<int8_t>(zero)), wide - k);
  add_up(codes, wide, sums, length, groups);
}

// Scales as they are stored: float32, float16 or bfloat16.
struct Scales {
  const void* first;
  int kind;  // 0, 1, 2
  // The bits of float32 of `count` of them from i on.
  void widen(int64_t i, int64_t count, int32_t* to) const {
    const uint16_t* halves = static_cast<const uint16_t*>(first) + i;
    int64_t done = 0;
    if (kind == 0) {
      std::memcpy(to, static_cast<const float*>(first) + i, count * 4);
    } else if (kind == 1) {
      for (; done + 8 <= count; done += 8) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + done));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + done), _mm256_castps_si256(_mm256_cvtph_ps(eight)));
      }
      for (; done < count; done++) {
        const float value = _cvtsh_ss(halves[done]);
        std::memcpy(to + done, &value, 4);
      }
    } else {
      for (; done < count; done++) to[done] = static_cast<int32_t>(static_cast<uint32_t>(halves[done]) << 16);
    }
  }
};

struct Operands {
  const uint8_t* qweight;
  Scales scales;
  const int8_t *zeros, *steps;
  const float* bias;
  int64_t m, n, k, wide, groups;  // wide: K up to a multiple of RUN; groups: of scales, zeros and steps, or 1
  int64_t length, units;          // inputs summed before they are scaled, and how many such sums a row has
  int32_t zero;                   // of the inputs
  const int8_t* codes;            // of x, [M, wide]
  const float* x_scales;          // [M]; of BOTH [groups, M]
  const int32_t* sums;            // [M, units]
  float* y;
};

// Codes of `outputs` rows from `first` on, inputs k0 .. k0 + inputs, and the numbers of their groups.
template <Kind KIND, bool PLAIN>
void unpack(const Operands& o, int64_t first, int64_t outputs, int64_t k0, int64_t inputs, const int8_t* ones, Tile& t) {
  const uint8_t* row[WIDE];  // beyond the last one its row again: what comes of it is not stored
  for (int64_t i = 0; i < WIDE; i++) row[i] = o.qweight + (first + std::min(i, outputs - 1)) * (o.wide / 2);
  for (int64_t k = 0; k < inputs; k += RUN)
    for (int v = 0; v < VECTORS; v++) {
      if (k % (2 * RUN) == 0) {  // a line of memory: ask for the one that is read AHEAD bytes on, or in the next tile
        const int64_t half = o.wide / 2, on = (k0 + k) / 2 + AHEAD;
        const int64_t at = on < half ? on : on + (WIDE - 1) * half;
        for (int i = 0; i < LANES; i++)
          _mm_prefetch(reinterpret_cast<const char*>(row[v * LANES + i] + at), _MM_HINT_T0);
      }
      Ints words[8];
      transposed(row + v * LANES, (k0 + k) / 2, words);
      uint8_t* to = t.codes + (k * VECTORS + 4 * v) * LANES;
      for (int i = 0; i < 8; i++) {
        store(to + i * WIDE * 4, low_nibbles(words[i]));
        store(to + (i + 8) * WIDE * 4, high_nibbles(words[i]));
      }
    }
  const int64_t groups = (inputs + o.length - 1) / o.length, group = o.groups == 1 ? 0 : k0 / o.length;
  for (int64_t i = 0; i < WIDE; i++) {
    const int64_t from = (first + std::min(i, outputs - 1)) * o.groups + group;
    if constexpr (in_groups(KIND)) {
      int32_t scales[MOST_GROUPS];
      o.scales.widen(from, groups, scales);
      for (int64_t g = 0; g < groups; g++) t.factors[g * WIDE + i] = scales[g];
    }
    if constexpr (!PLAIN)
      for (int64_t g = 0; g < groups; g++) {
        const int64_t at = from + (o.groups == 1 ? 0 : g), to = g * WIDE + i;
        t.offsets[to] = 8 + (o.zeros ? o.zeros[at] : 0);
        t.bases[to] = 0;
        if constexpr (KIND == Kind::STEPS) t.factors[to] = o.steps[at];
      }
  }
  if (!o.zero) return;
  for (int64_t g = 0, k = 0; k < inputs; g++, k += o.length) {
    const int64_t length = std::min(o.length, inputs - k);
    int32_t* bases = t.bases + g * WIDE;
    Ints acc[1][VECTORS];
    sum_products<1>(ones, 0, t.codes + k * WIDE, length / BLOCK, acc);
    for (int v = 0; v < VECTORS; v++) store(bases + v * LANES, acc[0][v]);
    for (int64_t i = 0; i < WIDE; i++)
      bases[i] = o.zero * (t.offsets[g * WIDE + i] * static_cast<int32_t>(length) - bases[i]);
  }
}

template <Kind KIND>
void finish(const Operands& o, int64_t row, int64_t first, int64_t outputs, const int32_t* total) {
  float* y = o.y + row * o.n + first;
  const float scale = KIND == Kind::BOTH ? 1.0f : o.x_scales[row];
  float scales[WIDE];
  if constexpr (!in_groups(KIND)) {
    int32_t bits[WIDE];
    o.scales.widen(first, outputs, bits);
    std::memcpy(scales, bits, sizeof(bits));
  }
  for (int64_t i = 0; i < outputs; i++) {
    float value;
    if constexpr (in_groups(KIND))
      std::memcpy(&value, total + i, 4);
    else
      value = static_cast<float>(total[i]) * scales[i];
    y[i] = o.bias ? __builtin_fmaf(value, scale, o.bias[first + i]) : value * scale;
  }
}

// Columns first .. first + outputs of y, rows begin .. end.
template <Kind KIND, bool PLAIN>
void multiply_tile(const Operands& o, int64_t first, int64_t outputs, int64_t begin, int64_t end, int64_t part,
                   const int8_t* ones, Tile& tile) {
  alignas(64) int32_t total[ROWS * WIDE];
  for (int64_t k0 = 0; k0 < o.k; k0 += part) {
    const int64_t all = o.groups == 1 ? o.wide : o.k;  // whole groups never reach into what is filled up
    const int64_t inputs = std::min(part, all - k0);
    unpack<KIND, PLAIN>(o, first, outputs, k0, (inputs + RUN - 1) / RUN * RUN, ones, tile);
    for (int64_t m = begin; m < end; m += ROWS) {
      const int64_t rows = std::min<int64_t>(ROWS, end - m);
      // Between parts the sums lie where y will be.
      for (int64_t r = 0; r < rows; r++)
        if (k0)
          std::memcpy(total + r * WIDE, o.y + (m + r) * o.n + first, outputs * 4);
        else
          std::memset(total + r * WIDE, 0, WIDE * 4);
      const int64_t group = k0 / o.length;
      const float* scales = KIND == Kind::BOTH ? o.x_scales + group * o.m + m : nullptr;
      const Inputs x{o.codes + m * o.wide + k0, o.wide, o.sums + m * o.units + group, o.units, scales, o.m};
      multiply_some<KIND, PLAIN>(rows, x, tile, inputs, o.length, total);
      for (int64_t r = 0; r < rows; r++)
        if (k0 + part < o.k)
          std::memcpy(o.y + (m + r) * o.n + first, total + r * WIDE, outputs * 4);
        else
          finish<KIND>(o, m + r, first, outputs, total + r * WIDE);
    }
  }
}

template <Kind KIND, bool PLAIN>
void multiply_all(const Operands& o) {
  const int64_t part = o.m > ROWS ? MANY : KIND == Kind::ROWS ? FEW_OF_ROWS : FEW, tiles = (o.n + WIDE - 1) / WIDE;
  // Threads share the outputs; where there are fewer tiles of them than threads, rows too.
  const int64_t most = (o.m + 8 * ROWS - 1) / (8 * ROWS);
  const int64_t shares = std::clamp<int64_t>((at::get_num_threads() + tiles - 1) / tiles, 1, most);
  const int64_t rows = ((o.m + shares - 1) / shares + ROWS - 1) / ROWS * ROWS;
  at::parallel_for(0, tiles * shares, 1, [&](int64_t from, int64_t to) {
    const int64_t groups = std::max<int64_t>(1, part / o.length);
    Room<uint8_t> codes(part * WIDE);
    Room<int32_t> offsets(groups * WIDE), bases(groups * WIDE), factors(groups * WIDE);
    Room<int8_t> ones(part);
    std::memset(ones.at, 1, part);
    Tile tile{codes.at, offsets.at, bases.at, factors.at};
    for (int64_t task = from; task < to; task++) {
      const int64_t first = task % tiles * WIDE, begin = task / tiles * rows;
      multiply_tile<KIND, PLAIN>(o, first, std::min<int64_t>(WIDE, o.n - first), begin, std::min(o.m, begin + rows), part,
                          ones.at, tile);
    }
  });
}

void multiply(const Operands& o) {
  const bool plain = !o.zeros && !o.zero;
  if (o.steps)
    multiply_all<Kind::STEPS, false>(o);
  else if (o.groups == 1)
    plain ? multiply_all<Kind::ROWS, true>(o) : multiply_all<Kind::ROWS, false>(o);
  else
    plain ? multiply_all<Kind::GROUPS, true>(o) : multiply_all<Kind::GROUPS, false>(o);
}

void linear(
    const float* x, const uint8_t* qweight, Scales scales, const int8_t* zeros, const int8_t* steps,
    const float* bias, float* y, int64_t m, int64_t n, int64_t k, int64_t groups, float input_scale,
    int32_t input_zero, int32_t bits) {
  const int64_t wide = (k + RUN - 1) / RUN * RUN;
  const int64_t unit = m > ROWS ? UNIT : FEW_OF_ROWS;
  const int64_t length = groups == 1 ? unit : k / groups, units = groups == 1 ? (wide + unit - 1) / unit : groups;
  const Room<int8_t> codes(m * wide);
  const Room<float> x_scales(m);
  const Room<int32_t> sums(m * units);
  at::parallel_for(0, m, std::max<int64_t>(1, 32768 / k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      quantize(x + i * k, k, wide, input_scale, input_zero, bits, codes.at + i * wide, x_scales.at + i,
               sums.at + i * units, length, units);
  });
  const Operands o{qweight, scales, zeros, steps, bias, m, n, k, wide, groups, length, units, input_zero, codes.at,
                   x_scales.at, sums.at, y};
  multiply(o);
}

// The same of codes that are made already (w4_ends.cpp), K a multiple of RUN; by_group: x_scales [groups, M].
void linear_of_codes(
    const int8_t* codes, const float* x_scales, bool by_group, const uint8_t* qweight, Scales scales,
    const float* bias, float* y, int64_t m, int64_t n, int64_t k, int64_t groups) {
  const int64_t unit = m > ROWS ? UNIT : FEW_OF_ROWS;
  const int64_t length = groups == 1 && !by_group ? unit : k / groups, units = (k + length - 1) / length;
  const Room<int32_t> sums(m * units);
  at::parallel_for(0, m, std::max<int64_t>(1, 65536 / k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) add_up(codes + i * k, k, sums.at + i * units, length, units);
  });
  const Operands o{qweight, scales, nullptr, nullptr, bias, m, n, k, k, groups, length, units, 0, codes, x_scales,
                   sums.at, y};
  by_group ? multiply_all<Kind::BOTH, true>(o) : multiply(o);
}

// A convolution's pictures [batch, height, width, channels] and its windows, in pixels.
struct Windows {
  int64_t batch, height, width, channels, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// One window's codes, (kh, kw, channel) in this order, filled up to `wide`; what lies outside is the zero point.
void gather(const Windows& w, const int8_t* codes, int8_t zero, int64_t row, int64_t wide, int8_t* to) {
  const int64_t b = row / (w.out_height * w.out_width), pixel = row % (w.out_height * w.out_width);
  const int64_t top = pixel / w.out_width * w.stride[0] - w.padding[0];
  const int64_t left = pixel % w.out_width * w.stride[1] - w.padding[1], c = w.channels;
  const bool whole = w.dilation[1] == 1 && left >= 0 && left + w.kernel[1] <= w.width;
  int8_t* const end = to + wide;
  for (int64_t i = 0; i < w.kernel[0]; i++) {
    const int64_t y = top + i * w.dilation[0];
    const int8_t* line = codes + (b * w.height + y) * w.width * c;
    if (y < 0 || y >= w.height) {
      std::memset(to, zero, w.kernel[1] * c);
      to += w.kernel[1] * c;
    } else if (whole) {
      std::memcpy(to, line + left * c, w.kernel[1] * c);
      to += w.kernel[1] * c;
    } else {
      for (int64_t j = 0; j < w.kernel[1]; j++, to += c) {
        const int64_t x = left + j * w.dilation[1];
        if (x < 0 || x >= w.width)
          std::memset(to, zero, c);
        else
          std::memcpy(to, line + x * c, c);
      }
    }
  }
  std::memset(to, zero, end - to);
}

// Windows are gathered some rows at a time, which multiply while they are in a cache.
void convolution(
    const float* x, const uint8_t* qweight, Scales scales, const int8_t* zeros, const int8_t* steps,
    const float* bias, float* y, const Windows& w, int64_t n, int64_t groups, const float* input_scales,
    int32_t input_zero, int32_t bits) {
  const int64_t k = w.kernel[0] * w.kernel[1] * w.channels, wide = (k + RUN - 1) / RUN * RUN;
  const int64_t size = w.out_height * w.out_width, all = w.batch * size, pixels = w.height * w.width;
  const int64_t most = std::min(all, std::max(GATHERED / wide, LEAST_ROWS) / ROWS * ROWS);
  const Room<int8_t> image(w.batch * pixels * w.channels), codes(most * wide);
  const Room<float> x_scales(most);
  const Room<int32_t> sums(std::max(most, ROWS * UNIT / FEW_OF_ROWS) * std::max(groups, wide / UNIT + 1));
  at::parallel_for(0, w.batch * pixels, std::max<int64_t>(1, 32768 / w.channels), [&](int64_t begin, int64_t end) {
    float same;
    for (int64_t i = begin; i < end; i++)
      quantize(x + i * w.channels, w.channels, w.channels, input_scales[i / pixels], input_zero, bits,
               image.at + i * w.channels, &same, nullptr, 0, 0);
  });
  for (int64_t first = 0; first < all; first += most) {
    const int64_t m = std::min(most, all - first), unit = m > ROWS ? UNIT : FEW_OF_ROWS;
    const int64_t length = groups == 1 ? unit : k / groups, units = groups == 1 ? (wide + unit - 1) / unit : groups;
    at::parallel_for(0, m, std::max<int64_t>(1, 65536 / k), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        gather(w, image.at, static_cast<int8_t>(input_zero), first + i, wide, codes.at + i * wide);
        add_up(codes.at + i * wide, wide, sums.at + i * units, length, units);
        x_scales.at[i] = input_scales[(first + i) / size];
      }
    });
    multiply(Operands{qweight, scales, zeros, steps, bias, m, n, k, wide, groups, length, units, input_zero, codes.at,
                      x_scales.at, sums.at, y + first * n});
  }
}

}  // namespace

// x [M, K], bias [N] or null, y [M, N]: float32. qweight: uint8 [N, K' / 2], K' = K up to a multiple of 64. scales: [N,
// G] or, with steps, [N]; scale_kind 0: float32, 1: float16, 2: bfloat16. zeros, steps: int8 [N, G] or null; G = 1, or
// K / G is a multiple of 32 that divides 2048. All contiguous, no size 0. input_scale below 0: by
// each row's largest value. Returns 0, or 1 where there was no memory. The caller has checked all sizes.
extern "C" int ptq4dm_w4a8(
    const float* x, const uint8_t* qweight, const void* scales, int scale_kind, const int8_t* zeros,
    const int8_t* steps, const float* bias, float* y, int64_t m, int64_t n, int64_t k, int64_t groups, float input_scale,
    int32_t input_zero, int32_t bits) {
  try {
    linear(x, qweight, Scales{scales, scale_kind}, zeros, steps, bias, y, m, n, k, groups, input_scale, input_zero, bits);
  } catch (const std::exception&) {  // it must not pass through a caller that knows nothing of C++
    return 1;
  }
  return 0;
}

// The same of codes int8 [M, K], K a multiple of 64, and their scales, [M] or, by_group, [G, M].
extern "C" int ptq4dm_w4_of_codes(
    const int8_t* codes, const float* x_scales, int32_t by_group, const uint8_t* qweight, const void* scales,
    int scale_kind, const float* bias, float* y, int64_t m, int64_t n, int64_t k, int64_t groups) {
  try {
    linear_of_codes(codes, x_scales, by_group, qweight, Scales{scales, scale_kind}, bias, y, m, n, k, groups);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

// The same for a convolution: x [batch, height, width, channels], y [batch, height', width', N], `sizes` the numbers of
// Windows in their order, K = kh kw channels. input_scales: one a picture, above zero or NaN.
extern "C" int ptq4dm_w4a8_conv(
    const float* x, const uint8_t* qweight, const void* scales, int scale_kind, const int8_t* zeros,
    const int8_t* steps, const float* bias, float* y, const int64_t* sizes, int64_t n, int64_t groups,
    const float* input_scales, int32_t input_zero, int32_t bits) {
  try {
    Windows w;
    static_assert(sizeof(w) == 14 * sizeof(int64_t));
    std::memcpy(&w, sizes, sizeof(w));
    convolution(x, qweight, Scales{scales, scale_kind}, zeros, steps, bias, y, w, n, groups, input_scales, input_zero,
                bits);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}
