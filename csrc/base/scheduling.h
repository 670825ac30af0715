// What the kernel should know about a thread of ours.
#pragma once

namespace vattn {

// From now on, waking the calling thread does not take the processor from whoever woke it. It is
// scheduled as SCHED_BATCH, at the same priority: with a lower one it would fall behind when the
// processors are busy. A hint: where the kernel refuses, nothing changes.
void yield_to_wakers() noexcept;

}  // namespace vattn
