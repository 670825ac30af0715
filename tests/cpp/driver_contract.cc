#include "driver_contract.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <thread>

#include "base/errors.h"
#include "base/units.h"

namespace vattn::test {
namespace {

using Run = std::vector<Extent>;

// The first byte of every page of a range, so that swapped and shifted pages show.
void fill(const Subject& s, uintptr_t base, size_t bytes, size_t value) {
  for (size_t at = 0; at < bytes; at += s.driver.page_bytes()) {
    CHECK(s.memory.write(base + at, static_cast<unsigned char>(value + at / 4096)));
  }
}

// As fill() left it; `skip` is where the range starts in what was filled.
bool filled(const Subject& s, uintptr_t base, size_t bytes, size_t value, size_t skip = 0) {
  for (size_t at = 0; at < bytes; at += s.driver.page_bytes()) {
    unsigned char found = 0;
    const auto expected = static_cast<unsigned char>(value + (skip + at) / 4096);
    if (!s.memory.read(base + at, &found) || found != expected) return false;
  }
  return true;
}

void says_what_it_is(const Subject& s) {
  VmmDriver& driver = s.driver;
  CHECK(is_power_of_two(driver.page_bytes()));
  CHECK(!driver.describe().empty());
  const MemoryInfo info = driver.memory_info();
  CHECK(info.total_bytes > 0);
  CHECK(info.free_bytes <= info.total_bytes);
}

void reservations_are_aligned_and_apart(const Subject& s) {
  VmmDriver& driver = s.driver;
  const size_t bytes = 8 * driver.page_bytes();
  const uintptr_t a = driver.reserve(bytes);
  const uintptr_t b = driver.reserve(bytes);
  CHECK_EQ(a % driver.page_bytes(), 0u);
  CHECK_EQ(b % driver.page_bytes(), 0u);
  CHECK(a + bytes <= b || b + bytes <= a);
  CHECK(!s.writable(a));
  driver.unreserve(a, bytes);
  driver.unreserve(b, bytes);
}

void a_run_lies_in_order_and_is_writable(const Subject& s) {
  VmmDriver& driver = s.driver;
  const Run run = {make_extent(driver, 4), make_extent(driver, 1), make_extent(driver, 2)};
  const size_t bytes = total_bytes(run);
  const uintptr_t base = driver.reserve(2 * bytes);
  driver.map(base, run);
  fill(s, base, bytes, 7);
  driver.populate(base, bytes);
  CHECK(filled(s, base, bytes, 7));
  CHECK(!s.writable(base + bytes));  // nothing beyond the run

  // Each extent on its own, elsewhere: it has the part that it had in the run.
  size_t at = 0;
  for (const Extent& extent : run) {
    driver.map(base + bytes, {extent});
    CHECK(filled(s, base + bytes, extent.bytes, 7, at));
    CHECK(driver.unmap(base + bytes, {extent}));
    at += extent.bytes;
  }
  CHECK(driver.unmap(base, run));
  for (const Extent& extent : run) driver.release(extent);
  driver.unreserve(base, 2 * bytes);
}

void part_of_a_run_can_be_unmapped(const Subject& s) {
  VmmDriver& driver = s.driver;
  const size_t page = driver.page_bytes();
  const Run run = {make_extent(driver, 1), make_extent(driver, 2), make_extent(driver, 1)};
  const uintptr_t base = driver.reserve(4 * page);
  driver.map(base, run);
  fill(s, base, 4 * page, 3);
  CHECK(driver.unmap(base + page, {run[1]}));
  CHECK(s.writable(base));
  CHECK(!s.writable(base + page));
  CHECK(!s.writable(base + 2 * page));
  CHECK(s.readable(base + 3 * page));
  driver.map(base + page, {run[1]});
  CHECK(s.writable(base));
  fill(s, base, page, 3);
  CHECK(filled(s, base, 4 * page, 3));  // unmapping lost nothing
  CHECK(driver.unmap(base, {run[0], run[1]}));
  CHECK(!s.writable(base) && !s.writable(base + 2 * page));
  CHECK(driver.unmap(base + 3 * page, {run[2]}));
  for (const Extent& extent : run) driver.release(extent);
  driver.unreserve(base, 4 * page);
}

void one_extent_can_be_mapped_twice(const Subject& s) {
  VmmDriver& driver = s.driver;
  const Extent extent = make_extent(driver, 2);
  const uintptr_t base = driver.reserve(2 * extent.bytes);
  driver.map(base, {extent, extent});
  fill(s, base, extent.bytes, 11);
  CHECK(filled(s, base + extent.bytes, extent.bytes, 11));
  CHECK(driver.unmap(base, {extent}));
  CHECK(filled(s, base + extent.bytes, extent.bytes, 11));
  CHECK(driver.unmap(base + extent.bytes, {extent}));
  driver.release(extent);
  driver.unreserve(base, 2 * extent.bytes);
}

void an_address_can_be_used_again(const Subject& s) {
  VmmDriver& driver = s.driver;
  const Extent a = make_extent(driver, 1);
  const Extent b = make_extent(driver, 1);
  const uintptr_t base = driver.reserve(a.bytes);
  for (int round = 0; round < 3; ++round) {
    driver.map(base, {a});
    fill(s, base, a.bytes, 1);
    CHECK(driver.unmap(base, {a}));
    driver.map(base, {b});
    CHECK(round == 0 || filled(s, base, b.bytes, 2));
    fill(s, base, b.bytes, 2);
    CHECK(driver.unmap(base, {b}));
  }
  driver.release(a);
  driver.release(b);
  driver.unreserve(base, a.bytes);
}

void an_exported_handle_is_the_same_memory(const Subject& s) {
  VmmDriver& driver = s.driver;
  const Extent ours = make_extent(driver, 2);
  const uintptr_t base = driver.reserve(2 * ours.bytes);
  const SharedHandle shared = driver.export_handle(ours);
  CHECK((fcntl(shared.fd, F_GETFD) & FD_CLOEXEC) != 0);
  const Extent theirs = {driver.import_handle(shared, ours.bytes), ours.bytes};
  CHECK(close(shared.fd) == 0);
  driver.map(base, {ours, theirs});
  fill(s, base, ours.bytes, 23);
  CHECK(filled(s, base + ours.bytes, ours.bytes, 23));
  CHECK(driver.unmap(base, {ours, theirs}));
  driver.release(theirs);
  driver.map(base, {ours});
  CHECK(filled(s, base, ours.bytes, 23));
  CHECK(driver.unmap(base, {ours}));
  driver.release(ours);
  driver.unreserve(base, 2 * ours.bytes);
}

void fences_of_idle_streams_have_passed(const Subject& s) {
  VmmDriver& driver = s.driver;
  const Stream stream = static_cast<Stream>(0);
  CHECK(driver.fence_passed(Fence::kNone));
  driver.wait_fence(Fence::kNone);
  driver.stream_wait_fence(stream, Fence::kNone);
  driver.release_fence(Fence::kNone);
  const Fence fence = driver.record_fence(stream);
  driver.wait_fence(fence);
  CHECK(driver.fence_passed(fence));
  driver.stream_wait_fence(stream, fence);
  driver.release_fence(fence);
  driver.synchronize();
}

void a_forked_child_is_refused_and_harmless(const Subject& s) {
  VmmDriver& driver = s.driver;
  const Extent extent = make_extent(driver, 1);
  const uintptr_t base = driver.reserve(extent.bytes);
  driver.map(base, {extent});
  fill(s, base, extent.bytes, 42);
  const Fence fence = driver.record_fence(static_cast<Stream>(0));
  CHECK(holds_in_child([&] {
    const bool refuses = throws<DriverError>([&] { driver.create(extent.bytes); }) &&
                         throws<DriverError>([&] { driver.reserve(extent.bytes); }) &&
                         throws<DriverError>([&] { driver.map(base, {extent}); }) &&
                         throws<DriverError>([&] { driver.copy({}, base, base + 8, 8); }) &&
                         throws<DriverError>([&] { driver.clear({}, base, 8); }) &&
                         throws<DriverError>([&] { driver.record_fence(Stream{}); }) &&
                         throws<DriverError>([&] { driver.export_handle(extent); }) &&
                         throws<DriverError>([&] { driver.import_handle({0, 0}, extent.bytes); });
    driver.release_fence(fence);
    const bool unmapped = driver.unmap(base, {extent});
    driver.release(extent);
    driver.unreserve(base, extent.bytes);
    const bool intact = !s.memory.works_in_forked_child || filled(s, base, extent.bytes, 42);
    return refuses && unmapped && intact;
  }));
  CHECK(filled(s, base, extent.bytes, 42));
  driver.release_fence(fence);
  CHECK(driver.unmap(base, {extent}));
  driver.release(extent);
  driver.unreserve(base, extent.bytes);
}

void threads_do_not_disturb_each_other(const Subject& s) {
  VmmDriver& driver = s.driver;
  std::vector<std::thread> threads;
  std::vector<std::string> problems(4);
  for (size_t id = 0; id < problems.size(); ++id) {
    threads.emplace_back([&s, &driver, &problem = problems[id], id] {
      try {
        for (int round = 0; round < 20; ++round) {
          const Run run = {make_extent(driver, 1), make_extent(driver, 2)};
          const uintptr_t base = driver.reserve(total_bytes(run));
          driver.map(base, run);
          fill(s, base, total_bytes(run), id * 50);
          const Fence fence =
              driver.record_fence(static_cast<Stream>(id % 3));  // CUDA's predefined streams
          driver.wait_fence(fence);
          driver.release_fence(fence);
          CHECK(filled(s, base, total_bytes(run), id * 50));
          CHECK(driver.unmap(base, run));
          for (const Extent& extent : run) driver.release(extent);
          driver.unreserve(base, total_bytes(run));
        }
      } catch (const CheckFailed& check) {
        problem = check.text;
      } catch (const std::exception& error) {
        problem = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& problem : problems) CHECK_EQ(problem, "");
}

// One byte through a pipe: the kernel says EFAULT where the program would crash.
bool passes_pipe(uintptr_t address, bool write_there) {
  int ends[2];
  if (pipe(ends) != 0) throw std::runtime_error("pipe() failed");
  char byte = 0x5a;
  char* const there = reinterpret_cast<char*>(address);
  const bool passed = write(ends[1], write_there ? &byte : there, 1) == 1 &&
                      read(ends[0], write_there ? there : &byte, 1) == 1;
  close(ends[0]);
  close(ends[1]);
  return passed;
}

}  // namespace

bool Subject::writable(uintptr_t address) const {
  return memory.write(address, 0x5a);
}

bool Subject::readable(uintptr_t address) const {
  unsigned char value = 0;
  return memory.read(address, &value);
}

Extent make_extent(VmmDriver& driver, size_t pages) {
  const size_t bytes = pages * driver.page_bytes();
  return {driver.create(bytes), bytes};
}

bool readable(uintptr_t address) {
  return passes_pipe(address, /*write_there=*/false);
}

bool writable(uintptr_t address) {
  return passes_pipe(address, /*write_there=*/true);
}

int exit_status_of(int child) {
  int status = 0;
  if (waitpid(child, &status, 0) != child) throw std::runtime_error("waitpid() failed");
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool holds_in_child(const std::function<bool()>& body) {
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("fork() failed");
  if (child == 0) {
    bool held = false;
    try {
      held = body();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "in the child: %s\n", error.what());
    } catch (const CheckFailed& check) {
      std::fprintf(stderr, "in the child: %s\n", check.text.c_str());
    }
    _exit(held ? 0 : 1);  // not exit(): static objects are the parent's
  }
  return exit_status_of(child) == 0;
}

std::vector<Test> driver_contract(const std::string& prefix, const DriverFactory& open,
                                  const MemoryFactory& memory) {
  std::vector<Clause> clauses = {
      {"says_what_it_is", says_what_it_is},
      {"reservations_are_aligned_and_apart", reservations_are_aligned_and_apart},
      {"a_run_lies_in_order_and_is_writable", a_run_lies_in_order_and_is_writable},
      {"part_of_a_run_can_be_unmapped", part_of_a_run_can_be_unmapped},
      {"one_extent_can_be_mapped_twice", one_extent_can_be_mapped_twice},
      {"an_address_can_be_used_again", an_address_can_be_used_again},
      {"an_exported_handle_is_the_same_memory", an_exported_handle_is_the_same_memory},
      {"fences_of_idle_streams_have_passed", fences_of_idle_streams_have_passed},
      {"a_forked_child_is_refused_and_harmless", a_forked_child_is_refused_and_harmless},
      {"threads_do_not_disturb_each_other", threads_do_not_disturb_each_other},
  };
  for (const Clause& clause : copy_clauses()) clauses.push_back(clause);
  std::vector<Test> tests;
  for (const Clause& clause : clauses) {
    tests.push_back({prefix + clause.name, [run = clause.run, open, memory] {
                       const std::shared_ptr<VmmDriver> driver = open();
                       const Memory access = memory();
                       run({*driver, access});
                     }});
  }
  return tests;
}

}  // namespace vattn::test
