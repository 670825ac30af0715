#include "base/scheduling.h"

#include <pthread.h>

#include "base/log.h"

namespace vattn {

void yield_to_wakers() noexcept {
  const sched_param no_priority{};
  const int code = pthread_setschedparam(pthread_self(), SCHED_BATCH, &no_priority);
  if (code != 0) log_line(LogLevel::kDebug, "SCHED_BATCH refused code=%d", code);
}

}  // namespace vattn
