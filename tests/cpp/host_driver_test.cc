// Host memory, where it differs from the contract's common part.
#include "driver/host_driver.h"

#include "base/units.h"
#include "check.h"

namespace {

using namespace vattn;
using namespace vattn::test;

constexpr size_t kPage = 4 * kKiB;

// A rehearsal may have more pages mapped than the machine has memory.
void a_rehearsal_touches_no_memory() {
  for (const HostUse use : {HostUse::kMemory, HostUse::kRehearsal}) {
    const auto driver = open_host_driver(kPage, use);
    const Extent extent{driver->create(2 * kPage), 2 * kPage};
    const uintptr_t base = driver->reserve(extent.bytes);
    driver->map(base, {extent});
    auto* const bytes = reinterpret_cast<unsigned char*>(base);
    bytes[0] = 7;
    driver->copy(Stream{}, base + kPage, base, kPage);
    driver->clear(Stream{}, base, 1);
    const bool touched = use == HostUse::kMemory;
    CHECK_EQ(int{bytes[kPage]}, touched ? 7 : 0);
    CHECK_EQ(int{bytes[0]}, touched ? 0 : 7);
    CHECK(driver->unmap(base, {extent}));
    driver->release(extent);
    driver->unreserve(base, extent.bytes);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return run_tests({TEST(a_rehearsal_touches_no_memory)}, argc > 1 ? argv[1] : nullptr);
}
