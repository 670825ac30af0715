// One event, one line, key=value:  vattn W unmap failed call=cuMemUnmap code=1 base=0x7f...
#pragma once

namespace vattn {

enum class LogLevel { kError, kWarning, kInfo, kDebug };

// Lines above `level` are dropped before they are formatted. Default: kWarning.
void set_log_level(LogLevel level) noexcept;

// printf-style; writes to stderr in one call, so lines of two threads never mix.
[[gnu::format(printf, 2, 3)]] void log_line(LogLevel level, const char* format, ...) noexcept;

}  // namespace vattn
