// The name of a function in an anonymous namespace, for error messages: the dynamic linker does
// not know it, so it is looked up in the symbol table of the file that it was loaded from.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace simt {

// Demangled name of the function at `address`, or "(unnamed)".
inline std::string symbol_name(const void* address) {
  Dl_info info;
  if (!address || !dladdr(address, &info)) return "(unnamed)";
  std::ifstream stream(info.dli_fname, std::ios::binary);
  const std::vector<char> file{std::istreambuf_iterator<char>(stream), {}};
  ElfW(Ehdr) header;
  if (file.size() < sizeof(header)) return "(unnamed)";
  std::memcpy(&header, file.data(), sizeof(header));
  const auto section = [&](size_t i) {
    ElfW(Shdr) s;
    std::memcpy(&s, file.data() + header.e_shoff + i * sizeof(s), sizeof(s));
    return s;
  };
  // Addresses in a file that can be loaded anywhere are relative to where it was loaded.
  const auto loaded_at = header.e_type == ET_DYN ? reinterpret_cast<uintptr_t>(info.dli_fbase) : 0;
  const uintptr_t wanted = reinterpret_cast<uintptr_t>(address) - loaded_at;
  for (size_t i = 0; i < header.e_shnum; ++i) {
    const auto symbols = section(i);
    if (symbols.sh_type != SHT_SYMTAB) continue;
    const char* names = file.data() + section(symbols.sh_link).sh_offset;
    for (size_t at = 0; at < symbols.sh_size; at += sizeof(ElfW(Sym))) {
      ElfW(Sym) symbol;
      std::memcpy(&symbol, file.data() + symbols.sh_offset + at, sizeof(symbol));
      if (symbol.st_value != wanted || (symbol.st_info & 0xf) != STT_FUNC) continue;
      const char* mangled = names + symbol.st_name;
      char* plain = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
      const std::string name = plain ? plain : mangled;
      std::free(plain);
      return name;
    }
  }
  return "(unnamed)";
}

}  // namespace simt
