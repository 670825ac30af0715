// Opening the CUDA driver: what is missing is said, with the remedy; what is refused is done
// without, and said too.
#include <stdexcept>

#include "base/log.h"
#include "base/units.h"
#include "double_control.h"
#include "driver/cuda_driver.h"
#include "driver_contract.h"
#include "stderr_text.h"

using namespace vattn;
using namespace vattn::test;

namespace {

constexpr size_t kPage = 2 * kMiB;

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

void a_missing_library_is_named_with_the_remedy() {
  CHECK_THROWS(DriverError, cuda::load_api("libvattn_not_there.so.1"), "libvattn_not_there.so.1");
  CHECK_THROWS(DriverError, cuda::load_api("libvattn_not_there.so.1"),
               "install an NVIDIA driver for CUDA 11.3 or newer, or use device=\"cpu\"");
}

void a_library_that_is_no_driver_is_named() {
  CHECK_THROWS(DriverError, cuda::load_api("libm.so.6"), "libm.so.6 has no cuGetProcAddress;");
}

void a_missing_function_is_named_with_its_version() {
  DOUBLE(hide_symbol)("cuMemMap");
  CHECK_THROWS(DriverError, open_cuda_driver(0), "has no cuMemMap of CUDA 10.2");
  CHECK_THROWS(DriverError, cuda::load_api("libcuda_old.so.1"), "has no cuMemMap of CUDA 10.2");
}

void a_driver_of_cuda_11_is_asked_in_its_own_way() {
  const cuda::Api api = cuda::load_api("libcuda_old.so.1");
  CHECK_EQ(api.cuInit(0), cuda::kSuccess);
  int devices = 0;
  CHECK_EQ(api.cuDeviceGetCount(&devices), cuda::kSuccess);
  CHECK_EQ(devices, 1);
}

void a_look_up_that_fails_is_reported() {
  DOUBLE(fail)("cuGetProcAddress", 3, 1, cuda::kErrorInvalidValue);
  CHECK_THROWS(DriverError, open_cuda_driver(0), "cuGetProcAddress failed (1)");
}

void a_device_that_is_not_there_is_a_wrong_argument() {
  DOUBLE(set_device_count)(2);
  CHECK_THROWS(std::invalid_argument, open_cuda_driver(2),
               "CUDA device 2 is not there: 2 CUDA devices are visible");
  CHECK_THROWS(std::invalid_argument, open_cuda_driver(-1), "CUDA device -1 is not there");
  CHECK(has(open_cuda_driver(1)->describe(), "device 1 "));
  DOUBLE(reset)();
  DOUBLE(set_device_count)(0);
  CHECK_THROWS(std::invalid_argument, open_cuda_driver(0),
               "0 CUDA devices are visible; use an ordinal below that, check CUDA_VISIBLE_DEVICES");
}

void a_driver_that_does_not_start_is_reported() {
  DOUBLE(fail)("cuInit", 0, 1, 803);
  CHECK_THROWS(DriverError, open_cuda_driver(0),
               "cuInit failed (803): unknown CUDA error; check that nvidia-smi works");
}

void a_device_without_virtual_memory_names_the_attribute() {
  DOUBLE(set_attribute)(cuda::kAttributeVirtualMemoryManagementSupported, 0);
  CHECK_THROWS(DriverError, open_cuda_driver(0),
               "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 0");
  CHECK_THROWS(DriverError, open_cuda_driver(0), "WSL, on Jetson");
  CHECK_THROWS(DriverError, open_cuda_driver(0), "device=\"cpu\"");
}

void a_context_that_cannot_be_made_is_reported() {
  DOUBLE(fail)("cuDevicePrimaryCtxRetain", 0, 1, cuda::kErrorOutOfMemory);
  CHECK_THROWS(DriverError, open_cuda_driver(0), "cuDevicePrimaryCtxRetain failed (2)");
}

void nothing_is_downgraded_without_need() {
  const std::string log = stderr_text([] {
    const std::string words = open_cuda_driver(0)->describe();
    CHECK(has(words, "CUDA driver 13.0, device 0 test double"));
    CHECK(has(words, "pages of 2 MiB, handle type posix_fd, gpudirect rdma requested"));
    CHECK(has(words, "access set per run"));
  });
  CHECK_EQ(log, "");
}

void rdma_is_dropped_first() {
  DOUBLE(refuse_rdma)(1);
  const std::string log = stderr_text([] {
    CHECK(has(open_cuda_driver(0)->describe(), "handle type posix_fd, gpudirect rdma off"));
  });
  CHECK_EQ(count(log, "\n"), 1u);
  CHECK(has(log,
            "vattn W allocation downgraded without=gpudirect_rdma call=cuMemCreate code=801 "
            "name=CUDA_ERROR_NOT_SUPPORTED device=0"));
}

void posix_fd_is_dropped_next_and_export_says_so() {
  DOUBLE(refuse_rdma)(1);
  DOUBLE(refuse_posix_fd)(1);
  std::shared_ptr<VmmDriver> driver;
  const std::string log = stderr_text([&] { driver = open_cuda_driver(0); });
  CHECK_EQ(count(log, "\n"), 2u);
  CHECK(has(log, "without=posix_fd"));
  CHECK(has(driver->describe(), "handle type none, gpudirect rdma off"));
  const Extent extent = {driver->create(kPage), kPage};
  CHECK_THROWS(DriverError, driver->export_handle(extent), "handle type none");
  driver->release(extent);
}

void what_the_attributes_deny_is_not_asked_for() {
  DOUBLE(set_attribute)(cuda::kAttributeHandleTypePosixFdSupported, 0);
  DOUBLE(set_attribute)(cuda::kAttributeGpuDirectRdmaWithVmmSupported, 0);
  set_log_level(LogLevel::kInfo);
  const std::string log = stderr_text(
      [] { CHECK(has(open_cuda_driver(0)->describe(), "handle type none, gpudirect rdma off")); });
  set_log_level(LogLevel::kWarning);
  CHECK(has(log, "vattn I handle export not supported device=0"));
  CHECK(has(log, "vattn I gpudirect rdma not supported device=0"));
}

void a_device_that_refuses_the_plainest_page_is_an_error() {
  DOUBLE(fail)("cuMemCreate", 0, 100, cuda::kErrorNotSupported);
  stderr_text([] {
    CHECK_THROWS(DriverError, open_cuda_driver(0), "not even one page could be allocated");
  });
  CHECK_EQ(DOUBLE(calls)("cuMemCreate"), 3u);
}

// No memory now says nothing about what the device supports.
void a_full_device_is_not_downgraded() {
  DOUBLE(set_total_memory)(0);
  CHECK_THROWS(DriverError, open_cuda_driver(0), "cuMemCreate failed (2)");
  CHECK_EQ(DOUBLE(calls)("cuMemCreate"), 1u);
}

void a_failing_granularity_query_is_reported_under_its_name() {
  DOUBLE(fail)("cuMemGetAllocationGranularity", 0, 100, cuda::kErrorInvalidValue);
  stderr_text([] {
    CHECK_THROWS(DriverError, open_cuda_driver(0), "cuMemGetAllocationGranularity failed (1)");
  });
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests = {TEST(a_missing_library_is_named_with_the_remedy),
                             TEST(a_library_that_is_no_driver_is_named),
                             TEST(a_missing_function_is_named_with_its_version),
                             TEST(a_driver_of_cuda_11_is_asked_in_its_own_way),
                             TEST(a_look_up_that_fails_is_reported),
                             TEST(a_device_that_is_not_there_is_a_wrong_argument),
                             TEST(a_driver_that_does_not_start_is_reported),
                             TEST(a_device_without_virtual_memory_names_the_attribute),
                             TEST(a_context_that_cannot_be_made_is_reported),
                             TEST(nothing_is_downgraded_without_need),
                             TEST(rdma_is_dropped_first),
                             TEST(posix_fd_is_dropped_next_and_export_says_so),
                             TEST(what_the_attributes_deny_is_not_asked_for),
                             TEST(a_device_that_refuses_the_plainest_page_is_an_error),
                             TEST(a_full_device_is_not_downgraded),
                             TEST(a_failing_granularity_query_is_reported_under_its_name)};
  return run_tests(on_clean_double(tests), argc > 1 ? argv[1] : nullptr);
}
