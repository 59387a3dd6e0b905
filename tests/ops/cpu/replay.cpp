// Repeats recorded native calls on another machine's build of the library and compares what they leave in memory, bit
// by bit. `replay LIBRARY` lists the levels that are here; `replay LIBRARY RECORD LEVEL THREADS` prints each call that
// differs and how many calls there were.
//
// A record is a row of calls; all numbers are int64, a string is its length and its bytes:
//     name, arguments before and after, result and one number more,
//     blocks of memory: how many, each before and after (empty: unchanged),
//     pointers within the arguments: how many, each its place, block and place in the block,
//     lists of pointers: how many, each its place in the arguments, how many pointers, and of each block (-1: null) and place.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <fstream>
#include <string>
#include <vector>

#include "../../../nautilus/ops/cpu/kernels.h"

namespace {

void* library;
template <class Function>
Function* find(const char* name) {
  void* found = dlsym(library, name);
  if (!found) fprintf(stderr, "%s\n", dlerror()), exit(2);
  return reinterpret_cast<Function*>(found);
}

struct Reader {
  std::ifstream file;
  int64_t number() {
    int64_t n = 0;
    file.read(reinterpret_cast<char*>(&n), sizeof n);
    return n;
  }
  std::string text() {
    std::string s(static_cast<size_t>(number()), 0);
    file.read(&s[0], static_cast<std::streamsize>(s.size()));
    return s;
  }
};

// Memory at an address as round as torch gives it, with bytes on both sides that nobody may touch.
struct Block {
  static constexpr size_t GUARD = 64;
  std::string before, after;
  char *base, *data;
  explicit Block(Reader& record) : before(record.text()), after(record.text()) {
    if (after.empty()) after = before;
    size_t all = (before.size() + 3 * GUARD - 1) / GUARD * GUARD;
    base = static_cast<char*>(aligned_alloc(GUARD, all));
    data = base + GUARD;
    memset(base, 0x5A, all);
    memcpy(data, before.data(), before.size());
  }
  bool guarded() const {
    for (size_t i = 0; i < GUARD; i++)
      if (base[i] != 0x5A || data[before.size() + i] != 0x5A) return false;
    return true;
  }
};

struct Pointer {
  int64_t at, block, offset;
};

int64_t call(const std::string& name, const void* arguments, int threads, int64_t* more) {
  *more = 0;
  if (name == "nautilus_quant_sizes") return find<int64_t(const void*, int64_t*)>(name.c_str())(arguments, more);
  if (name == "nautilus_linear_packed_size") return find<int64_t(const void*)>(name.c_str())(arguments);
  ReplayEntry entry{find<int(const void*, int)>(name.c_str()), arguments};
  Replay all{&entry, 1, 0};
  return find<int(Replay*, int)>("nautilus_replay")(&all, threads);
}

// Where two strings of one length differ, in units of four bytes.
void report(int64_t number, const std::string& name, const char* what, size_t which, const char* got,
            const std::string& want) {
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < want.size(); i += 4)
    if (memcmp(got + i, want.data() + i, want.size() - i < 4 ? want.size() - i : 4) && !wrong++) first = i;
  if (wrong)
    printf("call %lld, %s: %s %zu differs in %zu of %zu words, from byte %zu on\n", static_cast<long long>(number),
           name.c_str(), what, which, wrong, want.size() / 4, first);
}

void one_call(Reader& record, int64_t number, int threads) {
  std::string name = record.text(), arguments = record.text(), after = record.text();
  int64_t result = record.number(), extra = record.number(), more;
  std::vector<Block> blocks;
  for (int64_t count = record.number(); count > 0; count--) blocks.emplace_back(record);
  std::string given = arguments;
  std::vector<Pointer> pointers(static_cast<size_t>(record.number()));
  for (Pointer& p : pointers) {
    p = {record.number(), record.number(), record.number()};
    char* there = blocks[static_cast<size_t>(p.block)].data + p.offset;
    memcpy(&given[static_cast<size_t>(p.at)], &there, sizeof there);
  }
  std::vector<std::vector<char*>> lists(static_cast<size_t>(record.number()));
  for (std::vector<char*>& list : lists) {
    pointers.push_back({record.number(), 0, 0});
    list.resize(static_cast<size_t>(record.number()));
    for (char*& each : list) {
      int64_t block = record.number(), offset = record.number();
      each = block < 0 ? nullptr : blocks[static_cast<size_t>(block)].data + offset;
    }
    char** there = list.data();
    memcpy(&given[static_cast<size_t>(pointers.back().at)], &there, sizeof there);
  }
  int64_t found = call(name, given.data(), threads, &more);
  if (found != result || more != extra)
    printf("call %lld, %s: gives %lld and %lld, not %lld and %lld\n", static_cast<long long>(number), name.c_str(),
           static_cast<long long>(found), static_cast<long long>(more), static_cast<long long>(result),
           static_cast<long long>(extra));
  for (const Pointer& p : pointers) memcpy(&given[static_cast<size_t>(p.at)], &arguments[static_cast<size_t>(p.at)], 8);
  report(number, name, "argument", 0, given.data(), after);
  for (size_t i = 0; i < blocks.size(); i++) {
    report(number, name, "block", i, blocks[i].data, blocks[i].after);
    if (!blocks[i].guarded())
      printf("call %lld, %s: writes beyond block %zu\n", static_cast<long long>(number), name.c_str(), i);
    free(blocks[i].base);
  }
}

}  // namespace

int main(int count, char** given) {
  library = dlopen(given[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 2;
  auto name = find<const char*(int)>("nautilus_level_name");
  bool chosen = false;
  for (int level = 0; name(level); level++)
    if (count == 2 && find<int(int)>("nautilus_level_is_here")(level))
      puts(name(level));
    else if (count > 2 && !strcmp(given[3], name(level)))
      chosen = !find<int(int)>("nautilus_choose")(level);
  if (count == 2) return 0;
  if (!chosen) return fprintf(stderr, "no level %s here\n", given[3]), 3;
  find<void(void*, void*)>("nautilus_borrow_team")(nullptr, nullptr);
  Reader record{std::ifstream(given[2], std::ios::binary)};
  int64_t number = 0;
  for (; record.file.peek() != EOF; number++) one_call(record, number, atoi(given[4]));
  printf("%lld calls\n", static_cast<long long>(number));
}
