// Asking a machine what it offers: whatever is missing is in the answer, and nothing is thrown.
#include "driver/cuda_probe.h"

#include "base/units.h"
#include "double_control.h"
#include "driver/cuda_abi.h"

using namespace vattn;
using namespace vattn::test;

namespace {

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

CudaDeviceProbe only_device() {
  const CudaProbe probe = probe_cuda();
  CHECK_EQ(probe.problem, "");
  CHECK_EQ(probe.devices.size(), 1u);
  return probe.devices[0];
}

void a_device_tells_what_it_has() {
  DOUBLE(set_total_memory)(64 * kMiB);
  const CudaDeviceProbe device = only_device();
  CHECK_EQ(device.problem, "");
  CHECK_EQ(device.name, "test double (memfd)");
  CHECK_EQ(device.attributes.at("virtual_memory"), 1);
  CHECK_EQ(device.attributes.at("integrated"), 0);
  CHECK_EQ(device.bytes.at("free"), 64 * kMiB);
  CHECK_EQ(device.bytes.at("total"), 64 * kMiB);
  CHECK_EQ(device.bytes.at("granularity"), 2 * kMiB);
  CHECK_EQ(device.bytes.at("recommended_granularity"), 2 * kMiB);
  CHECK(device.bytes.at("reservable") >= kTiB);
  for (const char* kind : {"plain", "posix_fd", "gpudirect_rdma"}) {
    CHECK_EQ(device.pages.at(kind), "");
  }
}

// Asking for what an attribute denies is a breach, which ends the test.
void what_an_attribute_denies_is_not_tried() {
  for (int attribute : {cuda::kAttributeHandleTypePosixFdSupported,
                        cuda::kAttributeGpuDirectRdmaWithVmmSupported}) {
    DOUBLE(set_attribute)(attribute, 0);
  }
  const CudaDeviceProbe device = only_device();
  CHECK_EQ(device.pages.size(), 1u);
  CHECK_EQ(device.pages.at("plain"), "");
  CHECK_EQ(device.attributes.at("fabric"), 0);
}

void a_promise_that_is_not_kept_is_told() {
  DOUBLE(set_attribute)(cuda::kAttributeHandleTypeFabricSupported, 1);
  DOUBLE(fail)("cuMemCreate", 3, 1, 800);
  const CudaDeviceProbe device = only_device();
  CHECK_EQ(device.problem, "");
  CHECK_EQ(device.attributes.at("fabric"), 1);
  CHECK(has(device.pages.at("fabric"), "cuMemCreate failed (800)"));
  CHECK_EQ(device.pages.at("posix_fd"), "");
}

void a_missing_function_of_the_driver_is_told() {
  DOUBLE(hide_symbol)("cuMemMap");
  const CudaProbe probe = probe_cuda();
  CHECK_EQ(probe.failed_call, "cuGetProcAddress");
  CHECK(has(probe.problem, "has no cuMemMap of CUDA 10.2"));
  CHECK(probe.devices.empty());
}

void a_driver_that_does_not_start_is_told() {
  DOUBLE(fail)("cuInit", 0, 1, 803);
  const CudaProbe probe = probe_cuda();
  CHECK_EQ(probe.failed_call, "cuInit");
  CHECK(has(probe.problem, "cuInit failed (803)"));
}

void a_driver_without_devices_is_no_problem() {
  DOUBLE(set_device_count)(0);
  const CudaProbe probe = probe_cuda();
  CHECK_EQ(probe.problem, "");
  CHECK(probe.devices.empty());
}

void a_device_without_virtual_memory_is_told() {
  DOUBLE(set_attribute)(cuda::kAttributeVirtualMemoryManagementSupported, 0);
  const CudaDeviceProbe device = only_device();
  CHECK_EQ(device.name, "test double (memfd)");
  CHECK_EQ(device.attributes.at("virtual_memory"), 0);
  CHECK(has(device.problem, "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 0"));
}

void one_broken_device_does_not_hide_the_next() {
  DOUBLE(set_device_count)(2);
  DOUBLE(fail)("cuDevicePrimaryCtxRetain", 0, 1, cuda::kErrorOutOfMemory);
  const CudaProbe probe = probe_cuda();
  CHECK_EQ(probe.devices.size(), 2u);
  CHECK(has(probe.devices[0].problem, "cuDevicePrimaryCtxRetain failed (2)"));
  CHECK_EQ(probe.devices[1].problem, "");
  CHECK_EQ(probe.devices[1].pages.at("plain"), "");
}

// As under WSL and on Jetson: large reservations fail.
void the_largest_reservation_is_found_by_trying() {
  DOUBLE(fail)("cuMemAddressReserve", 0, 10, cuda::kErrorOutOfMemory);
  CHECK_EQ(only_device().bytes.at("reservable"), 16 * kGiB);
  DOUBLE(fail)("cuMemAddressReserve", 0, 100, cuda::kErrorOutOfMemory);
  CHECK_EQ(only_device().bytes.at("reservable"), 0u);
}

// Whatever call fails: an answer, nothing left behind.
void no_failing_call_leaves_anything_behind() {
  for (const char* call :
       {"cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute",
        "cuCtxPushCurrent", "cuMemGetInfo", "cuMemGetAllocationGranularity", "cuMemCreate"}) {
    DOUBLE(reset)();
    DOUBLE(fail)(call, 0, 100, cuda::kErrorInvalidValue);
    const CudaProbe probe = probe_cuda();
    const bool told = !probe.problem.empty() || !probe.devices[0].problem.empty() ||
                      !probe.devices[0].pages.at("plain").empty();
    if (!told) fail(__FILE__, __LINE__, std::string(call) + " failed, and nobody said so");
    CHECK_EQ(DOUBLE(context_references)(0), 0);
    check_clean();
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Test> tests = {TEST(a_device_tells_what_it_has),
                             TEST(what_an_attribute_denies_is_not_tried),
                             TEST(a_promise_that_is_not_kept_is_told),
                             TEST(a_missing_function_of_the_driver_is_told),
                             TEST(a_driver_that_does_not_start_is_told),
                             TEST(a_driver_without_devices_is_no_problem),
                             TEST(a_device_without_virtual_memory_is_told),
                             TEST(one_broken_device_does_not_hide_the_next),
                             TEST(the_largest_reservation_is_found_by_trying),
                             TEST(no_failing_call_leaves_anything_behind)};
  return run_tests(on_clean_double(tests), argc > 1 ? argv[1] : nullptr);
}
