// Every driver keeps the contract of VmmDriver. The CUDA driver runs on the libcuda double; with
// the argument --gpu, and where the double is not beside the program, on the first real device.
#include "driver_contract.h"

#include "base/units.h"
#include "double_control.h"
#include "driver/cuda_driver.h"
#include "driver/host_driver.h"

using namespace vattn;
using namespace vattn::test;

namespace {

// Adds that the double saw no breach of CUDA's contract and nothing left behind.
void append_on_double(std::vector<Test>* tests, const std::string& prefix,
                      const std::function<void()>& configure,
                      const MemoryFactory& memory = host_memory) {
  const auto open = [configure] {
    configure();
    return open_cuda_driver(0);
  };
  for (const Test& test : on_clean_double(driver_contract(prefix, open, memory)))
    tests->push_back(test);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--gpu") {
    return run_tests(driver_contract("gpu: ", [] { return open_cuda_driver(0); }, device_memory));
  }
  std::vector<Test> tests =
      driver_contract("host 4 KiB: ", [] { return open_host_driver(4 * kKiB); });
  for (const Test& test :
       driver_contract("host 2 MiB: ", [] { return open_host_driver(2 * kMiB); })) {
    tests.push_back(test);
  }
  append_on_double(&tests, "cuda: ", [] {});
  append_on_double(&tests, "cuda, one extent per call: ", [] {
    DOUBLE(refuse_multi_set_access)(1);
    DOUBLE(refuse_multi_unmap)(1);
  });
  append_on_double(&tests, "cuda, memory with leftovers: ", [] { DOUBLE(leave_leftovers)(1); });
  append_on_double(&tests, "cuda, through copies: ", [] {}, device_memory);
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
