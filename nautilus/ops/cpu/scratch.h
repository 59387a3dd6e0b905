// Pieces of one thread's scratch, each from a multiple of 64 bytes on.
#pragma once

#include <stdint.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace {

// Without a base the bytes are only counted.
struct Scratch {
  char* base;
  int64_t bytes = 0;

  template <class T>
  T* take(int64_t count) {
    int64_t begin = bytes, size = count * static_cast<int64_t>(sizeof(T));
    bytes += (size + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
    // Nobody's bytes after each piece, so that the sanitizer sees who runs past its end.
    bytes += 64;
    if (base) ASAN_POISON_MEMORY_REGION(base + begin + size, static_cast<size_t>(bytes - begin - size));
#endif
    return base ? reinterpret_cast<T*>(base + begin) : nullptr;
  }
};

// Memory that had other pieces before.
inline void without_pieces(char* base, int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(base, static_cast<size_t>(bytes));
#else
  (void)base, (void)bytes;
#endif
}

}  // namespace
