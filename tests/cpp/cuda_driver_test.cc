// The CUDA driver at work, where it differs from the contract's common part: refusals, roll-back,
// contexts, process exit and fork. Fences are in cuda_fences_test.cc.
#include "driver/cuda_driver.h"

#include <stdexcept>
#include <thread>

#include "base/units.h"
#include "double_control.h"
#include "driver_contract.h"
#include "stderr_text.h"

using namespace vattn;
using namespace vattn::test;

namespace {

constexpr size_t kPage = 2 * kMiB;

// A driver with a run of three extents of one page, and a reservation for it.
struct Setup {
  Setup() {
    for (int i = 0; i < 3; ++i) run.push_back({driver.create(kPage), kPage});
    base = driver.reserve(3 * kPage);
  }
  ~Setup() {
    for (const Extent& extent : run) driver.release(extent);
    driver.unreserve(base, 3 * kPage);
  }
  Setup(const Setup&) = delete;
  Setup& operator=(const Setup&) = delete;

  bool whole_run_works() {
    for (size_t i = 0; i < 3; ++i) {
      if (!writable(base + i * kPage)) return false;
    }
    return true;
  }

  CudaVmmDriver driver{0};
  std::vector<Extent> run;
  uintptr_t base = 0;
};

void a_full_device_is_out_of_device_memory() {
  DOUBLE(set_total_memory)(5 * kPage);
  Setup s;
  CHECK_EQ(s.driver.memory_info().total_bytes, 5 * kPage);
  CHECK_EQ(s.driver.memory_info().free_bytes, 2 * kPage);
  CHECK_THROWS(OutOfDeviceMemory, s.driver.create(3 * kPage),
               "cuMemCreate failed (2): CUDA_ERROR_OUT_OF_MEMORY: out of memory; asked for 6 MiB, "
               "lower the budget");
  CHECK_THROWS(OutOfDeviceMemory, s.driver.create(3 * kPage), "torch.cuda.empty_cache()");
  const Extent extent = {s.driver.create(2 * kPage), 2 * kPage};
  s.driver.release(extent);
}

void other_failures_of_create_are_plain_driver_errors() {
  Setup s;
  DOUBLE(fail)("cuMemCreate", 0, 1, 700);
  try {
    s.driver.create(kPage);
    CHECK(false);
  } catch (const OutOfDeviceMemory&) {
    CHECK(false);
  } catch (const DriverError& error) {
    CHECK_EQ(error.call(), "cuMemCreate");
    CHECK_EQ(error.code(), 700);
  }
}

void a_refused_reservation_names_size_and_remedy() {
  Setup s;
  DOUBLE(fail)("cuMemAddressReserve", 0, 1, cuda::kErrorOutOfMemory);
  CHECK_THROWS(DriverError, s.driver.reserve(4 * kGiB),
               "asked for 4 GiB of addresses, lower max_batch_size or max_seq_len");
}

// map() changes nothing when a call of it fails -- whichever call it is.
void map_is_all_or_nothing() {
  Setup s;
  for (int nth = 0; nth < 4; ++nth) {
    const bool access = nth == 3;
    DOUBLE(fail)(access ? "cuMemSetAccess" : "cuMemMap", access ? 0 : nth, 1, 999);
    CHECK_THROWS(DriverError, s.driver.map(s.base, s.run), "run of 3 extents, 6 MiB");
    CHECK_EQ(DOUBLE(live_mappings)(), 0u);
    CHECK(!readable(s.base));
  }
  s.driver.map(s.base, s.run);
  CHECK(s.whole_run_works());
  CHECK(s.driver.unmap(s.base, s.run));
  CHECK_EQ(s.driver.failed_give_backs(), 0u);
}

void access_is_set_once_per_run() {
  Setup s;
  s.driver.map(s.base, s.run);
  CHECK(s.driver.unmap(s.base, s.run));
  CHECK_EQ(DOUBLE(calls)("cuMemMap"), 3u);
  CHECK_EQ(DOUBLE(calls)("cuMemSetAccess"), 1u);
  CHECK_EQ(DOUBLE(calls)("cuMemUnmap"), 1u);
}

void a_driver_that_refuses_runs_is_asked_once() {
  DOUBLE(refuse_multi_set_access)(1);
  DOUBLE(refuse_multi_unmap)(1);
  Setup s;
  const std::string log = stderr_text([&] {
    for (int round = 0; round < 2; ++round) {
      s.driver.map(s.base, s.run);
      CHECK(s.whole_run_works());
      CHECK(s.driver.unmap(s.base, s.run));
    }
  });
  CHECK_EQ(log,
           "vattn W access set per extent call=cuMemSetAccess extents=3 device=0\n"
           "vattn W unmapping per extent call=cuMemUnmap extents=3 device=0\n");
  CHECK_EQ(DOUBLE(calls)("cuMemSetAccess"), 1u + 3u + 3u);
  CHECK_EQ(DOUBLE(calls)("cuMemUnmap"), 1u + 3u + 3u);
  CHECK(s.driver.describe().find("access set per extent") != std::string::npos);
}

// A wrong call is refused with the same code. It must not slow the driver down for good.
void one_failure_does_not_end_calls_over_runs() {
  Setup s;
  DOUBLE(fail)("cuMemSetAccess", 0, 2, cuda::kErrorInvalidValue);
  CHECK_THROWS(DriverError, s.driver.map(s.base, s.run), "cuMemSetAccess failed (1)");
  s.driver.map(s.base, s.run);
  CHECK(s.driver.unmap(s.base, s.run));
  CHECK_EQ(DOUBLE(calls)("cuMemSetAccess"), 3u);
}

void an_unmap_that_is_refused_leaves_the_run_mapped() {
  Setup s;
  s.driver.map(s.base, s.run);
  for (int code : {700, cuda::kErrorInvalidValue}) {
    DOUBLE(fail)("cuMemUnmap", 0, 2, code);  // the run, then the first extent
    const std::string log = stderr_text([&] { CHECK(!s.driver.unmap(s.base, s.run)); });
    CHECK(log.find("give-back failed call=cuMemUnmap code=" + std::to_string(code)) !=
          std::string::npos);
    CHECK_EQ(DOUBLE(live_mappings)(), 3u);
    CHECK(s.whole_run_works());
  }
  CHECK_EQ(s.driver.failed_give_backs(), 2u);
  DOUBLE(fail)("cuMemUnmap", 0, 0, 0);
  CHECK(s.driver.unmap(s.base, s.run));
}

void an_unmap_that_fails_half_way_is_undone() {
  DOUBLE(refuse_multi_unmap)(1);
  Setup s;
  s.driver.map(s.base, s.run);
  *reinterpret_cast<char*>(s.base) = 'k';
  DOUBLE(fail)("cuMemUnmap", /*skip=*/2, 1, 700);  // the run, the first extent, then this one
  stderr_text([&] { CHECK(!s.driver.unmap(s.base, s.run)); });
  CHECK_EQ(DOUBLE(live_mappings)(), 3u);
  CHECK_EQ(*reinterpret_cast<char*>(s.base), 'k');
  CHECK(s.whole_run_works());
  stderr_text([&] { CHECK(s.driver.unmap(s.base, s.run)); });
}

void a_driver_that_cannot_undo_says_stop() {
  DOUBLE(refuse_multi_unmap)(1);
  Setup s;
  s.driver.map(s.base, s.run);
  DOUBLE(fail)("cuMemUnmap", /*skip=*/2, 1, 700);
  DOUBLE(fail)("cuMemMap", 0, 1, 701);
  const std::string log = stderr_text([&] { CHECK(!s.driver.unmap(s.base, s.run)); });
  CHECK(log.find("vattn E unmap not undone code=701") != std::string::npos);
  CHECK_THROWS(DriverError, s.driver.create(kPage), "stop using this cache");
  CHECK_THROWS(DriverError, s.driver.map(s.base, {s.run[0]}), "stop using this cache");
  CHECK_THROWS(DriverError, s.driver.copy({}, s.base, s.base + kPage, 8), "stop using this cache");
  CHECK_THROWS(DriverError, s.driver.clear({}, s.base, 8), "stop using this cache");
  // Giving back still works.
  CHECK(s.driver.unmap(s.base + kPage, {s.run[1]}));
  CHECK(s.driver.unmap(s.base + 2 * kPage, {s.run[2]}));
}

void a_map_that_cannot_be_rolled_back_says_stop() {
  Setup s;
  DOUBLE(fail)("cuMemMap", /*skip=*/1, 1, 700);
  DOUBLE(fail)("cuMemUnmap", 0, 1, 701);
  stderr_text([&] { CHECK_THROWS(DriverError, s.driver.map(s.base, s.run), "cuMemMap failed"); });
  CHECK_THROWS(DriverError, s.driver.reserve(kPage), "stop using this cache");
  CHECK_EQ(s.driver.failed_give_backs(), 1u);
  CHECK(s.driver.unmap(s.base, {s.run[0]}));
}

void failures_of_copies_name_the_call() {
  Setup s;
  s.driver.map(s.base, s.run);
  DOUBLE(fail)("cuMemcpyDtoDAsync", 0, 1, 700);
  CHECK_THROWS(DriverError, s.driver.copy(Stream{}, s.base, s.base + kPage, 5),
               "cuMemcpyDtoDAsync failed (700)");
  DOUBLE(fail)("cuMemsetD8Async", 0, 1, 700);
  CHECK_THROWS(DriverError, s.driver.clear(Stream{}, s.base, 5), "cuMemsetD8Async failed (700)");
  s.driver.copy(Stream{}, s.base, s.base + kPage, 5);
  s.driver.clear(Stream{}, s.base, 5);
  CHECK(s.driver.unmap(s.base, s.run));
}

void failed_give_backs_are_counted_and_logged() {
  Setup s;
  DOUBLE(fail)("cuMemRelease", 0, 1, cuda::kErrorInvalidValue);
  DOUBLE(fail)("cuMemAddressFree", 0, 1, cuda::kErrorInvalidValue);
  const std::string log = stderr_text([&] {
    s.driver.release({static_cast<Handle>(0x77), kPage});
    s.driver.unreserve(0x1000, kPage);
  });
  CHECK_EQ(log,
           "vattn W give-back failed call=cuMemRelease code=1 name=CUDA_ERROR_INVALID_VALUE "
           "object=0x77 bytes=2097152\n"
           "vattn W give-back failed call=cuMemAddressFree code=1 name=CUDA_ERROR_INVALID_VALUE "
           "object=0x1000 bytes=2097152\n");
  CHECK_EQ(s.driver.failed_give_backs(), 2u);
}

// At process exit the driver is gone before our destructors run, and the memory with it.
void giving_back_after_shutdown_is_success() {
  const std::string log = stderr_text([] {
    Setup s;
    const Fence fence = s.driver.record_fence(Stream{});
    s.driver.map(s.base, s.run);
    DOUBLE(deinitialize)();
    CHECK(s.driver.unmap(s.base, s.run));
    s.driver.release_fence(fence);
    s.driver.release(s.run[0]);
    CHECK_EQ(s.driver.failed_give_backs(), 0u);
    CHECK_THROWS(DriverError, s.driver.create(kPage), "CUDA_ERROR_DEINITIALIZED");
  });
  CHECK_EQ(log, "");
  DOUBLE(reset)();  // what the process had is gone; there is no leak to look for
}

void threads_need_no_context_of_their_own() {
  Setup s;
  std::thread([&] {
    s.driver.map(s.base, s.run);
    CHECK(s.driver.unmap(s.base, s.run));
  }).join();
  CHECK_EQ(DOUBLE(calls)("cuCtxPushCurrent"), DOUBLE(calls)("cuCtxPopCurrent"));
}

void the_context_of_the_caller_is_restored() {
  DOUBLE(set_device_count)(2);
  const cuda::Api api = cuda::load_api();
  CHECK_EQ(api.cuInit(0), cuda::kSuccess);
  cuda::ContextPtr other = nullptr;
  CHECK_EQ(api.cuDevicePrimaryCtxRetain(&other, 1), cuda::kSuccess);
  CHECK_EQ(api.cuCtxPushCurrent(other), cuda::kSuccess);
  {
    Setup s;
    DOUBLE(fail)("cuMemMap", 1, 1, 700);
    CHECK_THROWS(DriverError, s.driver.map(s.base, s.run), "cuMemMap failed (700)");
    cuda::ContextPtr current = nullptr;
    CHECK_EQ(api.cuCtxGetCurrent(&current), cuda::kSuccess);
    CHECK(current == other);
  }
  cuda::ContextPtr popped = nullptr;
  CHECK_EQ(api.cuCtxPopCurrent(&popped), cuda::kSuccess);
  CHECK(popped == other);
  CHECK_EQ(api.cuDevicePrimaryCtxRelease(1), cuda::kSuccess);
}

void a_context_that_is_current_already_is_left_alone() {
  Setup s;
  const cuda::Api api = cuda::load_api();
  cuda::ContextPtr context = nullptr;
  CHECK_EQ(api.cuDevicePrimaryCtxRetain(&context, 0), cuda::kSuccess);
  CHECK_EQ(api.cuCtxPushCurrent(context), cuda::kSuccess);
  const size_t pushes = DOUBLE(calls)("cuCtxPushCurrent");
  s.driver.map(s.base, s.run);
  CHECK(s.driver.unmap(s.base, s.run));
  CHECK_EQ(DOUBLE(calls)("cuCtxPushCurrent"), pushes);
  CHECK_EQ(api.cuCtxPopCurrent(&context), cuda::kSuccess);
  CHECK_EQ(api.cuDevicePrimaryCtxRelease(0), cuda::kSuccess);
}

void a_context_that_cannot_be_entered_is_an_error() {
  Setup s;
  DOUBLE(fail)("cuCtxPushCurrent", 0, 1, cuda::kErrorInvalidContext);
  CHECK_THROWS(DriverError, s.driver.create(kPage), "cuCtxPushCurrent failed (201)");
}

// Not one call reaches the driver from the child: it would corrupt, or hang on, the parent's state.
void a_forked_child_makes_no_call_at_all() {
  auto driver = std::make_unique<CudaVmmDriver>(0);
  const Extent extent = {driver->create(kPage), kPage};
  const Fence fence = driver->record_fence(Stream{});
  CHECK(holds_in_child([&] {
    const char* kText = "'spawn', or make the cache in the child";
    CHECK_THROWS(DriverError, driver->memory_info(), kText);
    CHECK_THROWS(DriverError, driver->fence_passed(fence), kText);
    CHECK_THROWS(DriverError, driver->wait_fence(fence), kText);
    CHECK_THROWS(DriverError, driver->synchronize(), kText);
    CHECK_THROWS(DriverError, driver->create(kPage), kText);
    CHECK_THROWS(DriverError, driver->copy(Stream{}, 0, kPage, 1), kText);
    CHECK_THROWS(DriverError, driver->clear(Stream{}, 0, 1), kText);
    CHECK(!driver->describe().empty());
    driver->release(extent);
    driver->release_fence(fence);
    driver.reset();
    CHECK_EQ(breaches(), "");
    return true;
  }));
  driver->release(extent);
  driver->release_fence(fence);
}

void a_foreign_share_is_refused() {
  Setup s;
  CHECK_THROWS(std::invalid_argument, s.driver.import_handle({0, 4096}, kPage),
               "shared handle has offset 4096, expected 0");
  DOUBLE(fail)("cuMemImportFromShareableHandle", 0, 1, cuda::kErrorNotSupported);
  CHECK_THROWS(DriverError, s.driver.import_handle({0, 0}, kPage), "fd 0 of 2 MiB");
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<Test> tests = {TEST(a_full_device_is_out_of_device_memory),
                                   TEST(other_failures_of_create_are_plain_driver_errors),
                                   TEST(a_refused_reservation_names_size_and_remedy),
                                   TEST(map_is_all_or_nothing),
                                   TEST(access_is_set_once_per_run),
                                   TEST(a_driver_that_refuses_runs_is_asked_once),
                                   TEST(one_failure_does_not_end_calls_over_runs),
                                   TEST(an_unmap_that_is_refused_leaves_the_run_mapped),
                                   TEST(an_unmap_that_fails_half_way_is_undone),
                                   TEST(a_driver_that_cannot_undo_says_stop),
                                   TEST(a_map_that_cannot_be_rolled_back_says_stop),
                                   TEST(failures_of_copies_name_the_call),
                                   TEST(failed_give_backs_are_counted_and_logged),
                                   TEST(giving_back_after_shutdown_is_success),
                                   TEST(threads_need_no_context_of_their_own),
                                   TEST(the_context_of_the_caller_is_restored),
                                   TEST(a_context_that_is_current_already_is_left_alone),
                                   TEST(a_context_that_cannot_be_entered_is_an_error),
                                   TEST(a_forked_child_makes_no_call_at_all),
                                   TEST(a_foreign_share_is_refused)};
  return run_tests(on_clean_double(tests), argc > 1 ? argv[1] : nullptr);
}
