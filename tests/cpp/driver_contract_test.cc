// Every driver keeps the contract of VmmDriver. The CUDA driver runs on the libcuda double.
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
                      const std::function<void()>& configure) {
  const auto open = [configure] {
    configure();
    return open_cuda_driver(0);
  };
  for (const Test& test : on_clean_double(driver_contract(prefix, open))) tests->push_back(test);
}

}  // namespace

int main(int argc, char** argv) {
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
  return run_tests(tests, argc > 1 ? argv[1] : nullptr);
}
