// Virtual memory of the host: one sparse memfd holds all physical pages, mmap(MAP_FIXED) puts them
// under a reserved range. A real backend for CPU inference.
//
// Every extent gets file offsets of its own (see file_offsets.h). Extents that are neighbours in
// the file and in memory are one mapping to the kernel, which counts mappings (vm.max_map_count).
#pragma once

#include <memory>

#include "driver/vmm_driver.h"

namespace vattn {

enum class HostUse {
  kMemory,
  // Nobody will touch the memory, only lengths are played through: populates, copies and clears
  // nothing, and reports as much memory as anyone may ask for.
  kRehearsal,
};

// `page_bytes`: a power of two, at least the system's page. Throws std::invalid_argument.
std::shared_ptr<VmmDriver> open_host_driver(size_t page_bytes, HostUse use = HostUse::kMemory);

}  // namespace vattn
