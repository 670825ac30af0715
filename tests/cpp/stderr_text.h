// What a piece of code writes to stderr: the library's log goes there.
#pragma once

#include <functional>
#include <string>

namespace vattn::test {

// Also when `body` throws, stderr is itself again afterwards. Not for concurrent use.
std::string stderr_text(const std::function<void()>& body);

}  // namespace vattn::test
