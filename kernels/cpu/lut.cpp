// Linear layers with binary-coded weights on a CPU: sums of inputs with all signs in tables, looked up by byte shuffles.
// What is computed stands in lut.py. Built by library.py; AVX-512 with VBMI and VNNI where the machine has them, or AVX2.
//
//   x      -> whole numbers of 14 bits under one scale for each unit of inputs: a group, or 256 inputs of a row
//   table  for every 4 inputs: 16 sums, each 2 bytes, 32768 added so that bytes are unsigned; low and high bytes apart
//   codes  words of 32 signs of an output, 64 outputs beside one another; bit j + 16 h is input 2 j + h. Nibble p of a word is the place in table p
//   sums   of low bytes and of high bytes in whole numbers, exact; at the end of a unit times the scales, in float32
//
// AVX-512: the four bytes of a word look into four tables of 16 entries in one register (vpermb), and are summed into
// the word's own int32 (vpdpbusd): nothing is rearranged. AVX2: bytes of 32 words are put side by side, look into one
// table (vpshufb), and are summed in 16 bits.

#include <ATen/Parallel.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>

#include "room.h"

namespace {

constexpr int TILE = 64;          // outputs side by side
constexpr int WORD = 32;          // signs in a word
constexpr int UNIT = 256;         // inputs that share a scale of x where a row has one group
constexpr int TABLES = 256;       // bytes of the tables of a word: [nibble of the byte][low, high][byte of the word * 16]
constexpr int AHEAD = 2048;       // words between those that are read and those that are asked for
constexpr float LIMIT = 8191.0f;  // of x in whole numbers: four of them have a sum below 2^15

struct Operands {
  const int32_t* words;  // [tiles, width, bits, TILE]
  const uint16_t *alphas, *offsets;
  bool bfloat;
  const float* bias;
  float* y;
  int64_t m, n, k, width, groups, bits;
  int64_t length, units;   // words of a unit, units of a row
  const uint8_t* tables;   // [M, width, TABLES]
  const float *scales, *sums;  // of x [M, units]
};

// The 16 sums of four numbers with all signs, bit j of the place for number j, as low bytes and as high bytes.
inline void fill_table(const int16_t* x, uint8_t* low, uint8_t* high) {
  const __m256i places = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m256i sum = _mm256_set1_epi16(static_cast<int16_t>(-32768 - (x[0] + x[1] + x[2] + x[3])));
  for (int j = 0; j < 4; j++) {
    const __m256i bit = _mm256_set1_epi16(static_cast<int16_t>(1 << j));
    const __m256i set = _mm256_cmpeq_epi16(_mm256_and_si256(places, bit), bit);
    sum = _mm256_add_epi16(sum, _mm256_and_si256(set, _mm256_set1_epi16(static_cast<int16_t>(2 * x[j]))));
  }
  const __m256i lows = _mm256_and_si256(sum, _mm256_set1_epi16(255)), highs = _mm256_srli_epi16(sum, 8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low),
                   _mm_packus_epi16(_mm256_castsi256_si128(lows), _mm256_extracti128_si256(lows, 1)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high),
                   _mm_packus_epi16(_mm256_castsi256_si128(highs), _mm256_extracti128_si256(highs, 1)));
}

// Ask for a step's words before they are read: planes within a unit are no order that a CPU foresees.
inline const int32_t* ask_for(const int32_t* words) {
  for (int line = 0; line < TILE; line += 16) _mm_prefetch(reinterpret_cast<const char*>(words + line), _MM_HINT_T0);
  return words + TILE;
}

// Tables, scales and sums of one row of x [K].
void prepare(const float* x, const Operands& o, uint8_t* tables, float* scales, float* sums) {
  alignas(64) int16_t whole[UNIT];  // within a word in the order of its bits
  for (int64_t u = 0; u < o.units; u++) {
    const int64_t from = u * o.length * WORD, count = std::min(o.length * WORD, o.k - from);
    const int64_t words = std::min(o.length, o.width - u * o.length);
    int32_t peak = 0;  // as bits of an int32, NaN is the largest of all
    for (int64_t i = 0; i < count; i++) {
      int32_t raw;
      std::memcpy(&raw, x + from + i, 4);
      peak = std::max(peak, raw & 0x7fffffff);
    }
    float most;
    std::memcpy(&most, &peak, 4);
    const float scale = most / LIMIT;
    const double inverse = scale > 0.0f && std::isfinite(scale) ? 1.0 / static_cast<double>(scale) : 0.0;
    int32_t sum = 0;
    std::fill(whole, whole + words * WORD, static_cast<int16_t>(0));
    for (int64_t i = 0; i < count; i++) {
      const float value = x[from + i] * static_cast<float>(inverse);
      const float near = std::nearbyint(std::isfinite(value) ? std::clamp(value, -LIMIT, LIMIT) : 0.0f);
      whole[i / WORD * WORD + i % WORD / 2 + i % 2 * (WORD / 2)] = static_cast<int16_t>(near);
      sum += static_cast<int32_t>(near);
    }
    scales[u] = scale;  // infinity or NaN where x holds any: so are all products
    sums[u] = scale * static_cast<float>(sum);
    for (int64_t w = 0; w < words; w++) {
      uint8_t* to = tables + (u * o.length + w) * TABLES;
      for (int p = 0; p < 8; p++) {
        uint8_t* place = to + p % 2 * (TABLES / 2) + p / 2 * 16;
        fill_table(whole + w * WORD + 4 * p, place, place + TABLES / 4);
      }
    }
  }
}

#if defined(__AVX512VNNI__)
#define VBMI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")))

VBMI inline __m512 wide_of(const uint16_t* from, bool bfloat) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return bfloat ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)) : _mm512_cvtph_ps(halves);
}

// A tile of outputs of R rows from `row` on, without the bias.
template <int R>
VBMI void tile_vbmi(const Operands& o, int64_t tile, int64_t row, float (*total)[TILE]) {
  const __m512i nibble = _mm512_set1_epi8(15), byte_of = _mm512_set1_epi32(0x30201000);
  const __m512i ones = _mm512_set1_epi8(1);
  __m512 found[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < 4; v++) found[r][v] = _mm512_setzero_ps();
  for (int64_t u = 0; u < o.units; u++) {
    const int64_t first = u * o.length, last = std::min(first + o.length, o.width), group = o.groups == 1 ? 0 : u;
    const __m512i centre = _mm512_set1_epi32(static_cast<int32_t>((last - first) * 8 * 32768));
    const int32_t* ahead = o.words + (tile * o.width + first) * o.bits * TILE + AHEAD;
    for (int64_t i = 0; i < o.bits; i++) {
      __m512i low[R][4], high[R][4];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < 4; v++) low[r][v] = high[r][v] = _mm512_setzero_si512();
      for (int64_t w = first; w < last; w++) {
        const int32_t* words = o.words + ((tile * o.width + w) * o.bits + i) * TILE;
        ahead = ask_for(ahead);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
          __m512i lows[R], highs[R];
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            const uint8_t* table = o.tables + ((row + r) * o.width + w) * TABLES + half * (TABLES / 2);
            lows[r] = _mm512_load_si512(table);
            highs[r] = _mm512_load_si512(table + TABLES / 4);
          }
#pragma GCC unroll 8
          for (int v = 0; v < 4; v++) {
            __m512i codes = _mm512_loadu_si512(words + 16 * v);
            if (half) codes = _mm512_srli_epi16(codes, 4);
            codes = _mm512_ternarylogic_epi32(codes, nibble, byte_of, 0xEA);  // (codes & nibble) | byte_of
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
              low[r][v] = _mm512_dpbusd_epi32(low[r][v], _mm512_permutexvar_epi8(codes, lows[r]), ones);
              high[r][v] = _mm512_dpbusd_epi32(high[r][v], _mm512_permutexvar_epi8(codes, highs[r]), ones);
            }
          }
        }
      }
      const uint16_t* alphas = o.alphas + ((tile * o.groups + group) * o.bits + i) * TILE;
#pragma GCC unroll 8
      for (int v = 0; v < 4; v++) {
        const __m512 alpha = wide_of(alphas + 16 * v, o.bfloat);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const __m512i sum = _mm512_sub_epi32(_mm512_add_epi32(low[r][v], _mm512_slli_epi32(high[r][v], 8)), centre);
          const __m512 scale = _mm512_set1_ps(o.scales[(row + r) * o.units + u]);
          found[r][v] = _mm512_fmadd_ps(alpha, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale), found[r][v]);
        }
      }
    }
    if (o.offsets) {
      const uint16_t* offsets = o.offsets + (tile * o.groups + group) * TILE;
      for (int v = 0; v < 4; v++)
        for (int r = 0; r < R; r++)
          found[r][v] = _mm512_fmadd_ps(wide_of(offsets + 16 * v, o.bfloat),
                                        _mm512_set1_ps(o.sums[(row + r) * o.units + u]), found[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < 4; v++) _mm512_storeu_ps(total[r] + 16 * v, found[r][v]);
}

bool has_vbmi() {
  static const bool has = __builtin_cpu_supports("avx512vbmi");
  return has;
}
#endif

inline __m256 wide_of_8(const uint16_t* from, bool bfloat) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return bfloat ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)) : _mm256_cvtph_ps(halves);
}

inline __m256i table_of(const uint8_t* from) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(from)));
}

// Sums of bytes: those in even places, and those in odd ones.
struct Bytes {
  __m256i all = _mm256_setzero_si256(), odd = _mm256_setzero_si256();
  inline void add(__m256i bytes) {
    all = _mm256_add_epi16(all, bytes);
    odd = _mm256_add_epi16(odd, _mm256_srli_epi16(bytes, 8));
  }
  // int32 of the outputs 16 v + 8 h + 0 .. 7.
  inline void spread(__m256i* to) const {
    const __m256i even = _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8)), none = _mm256_setzero_si256();
    const __m256i first = _mm256_unpacklo_epi16(even, odd), second = _mm256_unpackhi_epi16(even, odd);
    to[0] = _mm256_unpacklo_epi16(first, none);
    to[1] = _mm256_unpackhi_epi16(first, none);
    to[2] = _mm256_unpacklo_epi16(second, none);
    to[3] = _mm256_unpackhi_epi16(second, none);
  }
};

void tile_avx2(const Operands& o, int64_t tile, int64_t row, float* total) {
  const __m256i by_byte = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12, 1, 5, 9,
                                           13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int h = 0; h < 2; h++) {
    __m256 found[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t u = 0; u < o.units; u++) {
      const int64_t first = u * o.length, last = std::min(first + o.length, o.width), group = o.groups == 1 ? 0 : u;
      const __m256i centre = _mm256_set1_epi32(static_cast<int32_t>((last - first) * 8 * 32768));
      const __m256 scale = _mm256_set1_ps(o.scales[row * o.units + u]);
      const int32_t* ahead = o.words + (tile * o.width + first) * o.bits * TILE + AHEAD;
      for (int64_t i = 0; i < o.bits; i++) {
        Bytes low, high;
        for (int64_t w = first; w < last; w++) {
          const int32_t* words = o.words + ((tile * o.width + w) * o.bits + i) * TILE + 8 * h;
          ahead = ask_for(ahead);
          const uint8_t* table = o.tables + (row * o.width + w) * TABLES;
          __m256i a[4], b[4];
#pragma GCC unroll 4
          for (int v = 0; v < 4; v++)
            a[v] = _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 16 * v)), by_byte);
          const __m256i p = _mm256_unpacklo_epi32(a[0], a[1]), q = _mm256_unpackhi_epi32(a[0], a[1]);
          const __m256i r = _mm256_unpacklo_epi32(a[2], a[3]), s = _mm256_unpackhi_epi32(a[2], a[3]);
          b[0] = _mm256_unpacklo_epi64(p, r);
          b[1] = _mm256_unpackhi_epi64(p, r);
          b[2] = _mm256_unpacklo_epi64(q, s);
          b[3] = _mm256_unpackhi_epi64(q, s);
#pragma GCC unroll 4
          for (int c = 0; c < 4; c++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
              const __m256i place = _mm256_and_si256(half ? _mm256_srli_epi16(b[c], 4) : b[c], nibble);
              const uint8_t* from = table + half * (TABLES / 2) + c * 16;
              low.add(_mm256_shuffle_epi8(table_of(from), place));
              high.add(_mm256_shuffle_epi8(table_of(from + TABLES / 4), place));
            }
        }
        __m256i lows[4], highs[4];
        low.spread(lows);
        high.spread(highs);
        const uint16_t* alphas = o.alphas + ((tile * o.groups + group) * o.bits + i) * TILE + 8 * h;
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
          const __m256i sum = _mm256_sub_epi32(_mm256_add_epi32(lows[v], _mm256_slli_epi32(highs[v], 8)), centre);
          const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), scale);
          found[v] = _mm256_fmadd_ps(wide_of_8(alphas + 16 * v, o.bfloat), value, found[v]);
        }
      }
      if (o.offsets)
        for (int v = 0; v < 4; v++)
          found[v] = _mm256_fmadd_ps(wide_of_8(o.offsets + (tile * o.groups + group) * TILE + 8 * h + 16 * v, o.bfloat),
                                     _mm256_set1_ps(o.sums[row * o.units + u]), found[v]);
    }
    for (int v = 0; v < 4; v++) _mm256_storeu_ps(total + 16 * v + 8 * h, found[v]);
  }
}

void finish(const Operands& o, int64_t tile, int64_t row, const float* total) {
  const int64_t first = tile * TILE, count = std::min<int64_t>(TILE, o.n - first);
  float* y = o.y + row * o.n + first;
  for (int64_t i = 0; i < count; i++) y[i] = o.bias ? total[i] + o.bias[first + i] : total[i];
}

void multiply(const Operands& o, int64_t tile) {
  alignas(64) float total[2][TILE];
  int64_t row = 0;
#if defined(__AVX512VNNI__)
  if (has_vbmi()) {
    for (; row + 2 <= o.m; row += 2) {
      tile_vbmi<2>(o, tile, row, total);
      finish(o, tile, row, total[0]);
      finish(o, tile, row + 1, total[1]);
    }
    if (row < o.m) {
      tile_vbmi<1>(o, tile, row, total);
      finish(o, tile, row, total[0]);
    }
    return;
  }
#endif
  for (; row < o.m; row++) {
    tile_avx2(o, tile, row, total[0]);
    finish(o, tile, row, total[0]);
  }
}

void linear(Operands o, const float* x) {
  o.width = (o.k + WORD - 1) / WORD;
  o.length = o.groups == 1 ? UNIT / WORD : o.k / o.groups / WORD;
  o.units = o.groups == 1 ? (o.width + o.length - 1) / o.length : o.groups;
  const Room<uint8_t> tables(o.m * o.width * TABLES);
  const Room<float> scales(o.m * o.units), sums(o.m * o.units);
  o.tables = tables.at, o.scales = scales.at, o.sums = sums.at;
  at::parallel_for(0, o.m, std::max<int64_t>(1, 8192 / o.k), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      prepare(x + i * o.k, o, tables.at + i * o.width * TABLES, scales.at + i * o.units, sums.at + i * o.units);
  });
  at::parallel_for(0, (o.n + TILE - 1) / TILE, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile++) multiply(o, tile);
  });
}

}  // namespace

// x [M, K], bias [N] or null, y [M, N]: float32. words int32 [T, W, bits, 64], alphas [T, G, bits, 64], offsets [T, G,
// 64] or null, float16 or, with bfloat, bfloat16; G = 1, or K / G is 32, 64 or 128. All contiguous, no size 0. Returns 0,
// or 1 where there was no memory. The caller has checked all sizes.
extern "C" int ptq4dm_lut(
    const float* x, const int32_t* words, const void* alphas, const void* offsets, int bfloat, const float* bias, float* y,
    int64_t m, int64_t n, int64_t k, int64_t groups, int64_t bits) {
  try {
    Operands o{};
    o.words = words, o.bias = bias, o.y = y, o.bfloat = bfloat != 0;
    o.alphas = static_cast<const uint16_t*>(alphas), o.offsets = static_cast<const uint16_t*>(offsets);
    o.m = m, o.n = n, o.k = k, o.groups = groups, o.bits = bits;
    linear(o, x);
  } catch (const std::exception&) {  // it must not pass through a caller that knows nothing of C++
    return 1;
  }
  return 0;
}
