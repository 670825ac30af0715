#include "base/log.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace vattn {
namespace {

std::atomic<LogLevel> g_level{LogLevel::kWarning};

}  // namespace

void set_log_level(LogLevel level) noexcept {
  g_level.store(level, std::memory_order_relaxed);
}

void log_line(LogLevel level, const char* format, ...) noexcept {
  if (level > g_level.load(std::memory_order_relaxed)) return;
  constexpr const char* kLetters = "EWID";
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  std::fprintf(stderr, "vattn %c %s\n", kLetters[static_cast<int>(level)], text);
}

}  // namespace vattn
