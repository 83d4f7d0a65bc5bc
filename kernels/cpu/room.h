// Memory of a kernel for the length of a call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>

template <typename T>
struct Room {  // on a cache line of its own
  explicit Room(int64_t count) : at(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), ALIGN))) {}
  ~Room() { ::operator delete(at, ALIGN); }
  Room(const Room&) = delete;
  static constexpr std::align_val_t ALIGN{64};
  T* at;
};
