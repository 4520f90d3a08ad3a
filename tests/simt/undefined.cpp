// What -fsanitize=undefined calls, in place of the compiler's own run-time library: the launch ends
// with an error that names the kernel, the thread and the line, and Python sees an exception.
#include "simt.h"

namespace {

// Every handler's first argument begins with this (UBSan ABI, compiler-rt/lib/ubsan/ubsan_value.h).
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

void report(const char* what, const void* data) {
  const auto* at = static_cast<const SourceLocation*>(data);
  const simt::Site site{at->file, static_cast<int>(at->line)};
  const std::string message = std::string("undefined behaviour: ") + what;
  if (simt::machine.current) simt::fail(message, site);
  // In the host code of an operator, which must not be left by an exception from here.
  if (simt::machine.host_error.empty()) simt::machine.host_error = message + "; " + to_string(site);
}

}  // namespace

#define HANDLER(name, what)                                                                 \
  extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_##name(void* data) { \
    report(what, data);                                                                     \
  }

HANDLER(add_overflow, "signed addition overflows")
HANDLER(sub_overflow, "signed subtraction overflows")
HANDLER(mul_overflow, "signed multiplication overflows")
HANDLER(negate_overflow, "negation overflows")
HANDLER(divrem_overflow, "division by zero or overflow")
HANDLER(shift_out_of_bounds, "shift by a wrong amount")
HANDLER(out_of_bounds, "array index out of bounds")
HANDLER(type_mismatch_v1, "null or misaligned pointer")
HANDLER(pointer_overflow, "pointer arithmetic overflows")
HANDLER(load_invalid_value, "bool or enum without a valid value")
HANDLER(invalid_builtin, "clz or ctz of zero")
HANDLER(vla_bound_not_positive, "array without elements")
HANDLER(nonnull_arg, "null argument")
HANDLER(nonnull_return_v1, "null return value")
HANDLER(float_cast_overflow, "float does not fit the integer")
HANDLER(builtin_unreachable, "unreachable code reached")
HANDLER(missing_return, "function ends without a value")
