#include "driver_contract.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <thread>

#include "base/errors.h"
#include "base/units.h"

namespace vattn::test {
namespace {

using Run = std::vector<Extent>;

// The first byte of every page of an extent, so that swapped and shifted pages show.
void fill(VmmDriver& driver, uintptr_t base, size_t bytes, unsigned char value) {
  for (size_t at = 0; at < bytes; at += driver.page_bytes()) {
    *reinterpret_cast<unsigned char*>(base + at) = static_cast<unsigned char>(value + at / 4096);
  }
}

bool filled(VmmDriver& driver, uintptr_t base, size_t bytes, unsigned char value) {
  for (size_t at = 0; at < bytes; at += driver.page_bytes()) {
    const auto expected = static_cast<unsigned char>(value + at / 4096);
    if (*reinterpret_cast<unsigned char*>(base + at) != expected) return false;
  }
  return true;
}

Extent make_extent(VmmDriver& driver, size_t pages) {
  const size_t bytes = pages * driver.page_bytes();
  return {driver.create(bytes), bytes};
}

size_t bytes_of(const Run& run) {
  size_t bytes = 0;
  for (const Extent& extent : run) bytes += extent.bytes;
  return bytes;
}

void says_what_it_is(VmmDriver& driver) {
  CHECK(is_power_of_two(driver.page_bytes()));
  CHECK(!driver.describe().empty());
  const MemoryInfo info = driver.memory_info();
  CHECK(info.total_bytes > 0);
  CHECK(info.free_bytes <= info.total_bytes);
}

void reservations_are_aligned_and_apart(VmmDriver& driver) {
  const size_t bytes = 8 * driver.page_bytes();
  const uintptr_t a = driver.reserve(bytes);
  const uintptr_t b = driver.reserve(bytes);
  CHECK_EQ(a % driver.page_bytes(), 0u);
  CHECK_EQ(b % driver.page_bytes(), 0u);
  CHECK(a + bytes <= b || b + bytes <= a);
  CHECK(!writable(a));
  driver.unreserve(a, bytes);
  driver.unreserve(b, bytes);
}

void a_run_lies_in_order_and_is_writable(VmmDriver& driver) {
  const Run run = {make_extent(driver, 4), make_extent(driver, 1), make_extent(driver, 2)};
  const size_t bytes = bytes_of(run);
  const uintptr_t base = driver.reserve(2 * bytes);
  driver.map(base, run);
  fill(driver, base, bytes, 7);
  driver.populate(base, bytes);
  CHECK(filled(driver, base, bytes, 7));
  CHECK(!writable(base + bytes));  // nothing beyond the run

  // Each extent on its own, elsewhere: it has the part that it had in the run.
  uintptr_t at = base;
  for (const Extent& extent : run) {
    driver.map(base + bytes, {extent});
    CHECK(std::memcmp(reinterpret_cast<void*>(at), reinterpret_cast<void*>(base + bytes),
                      extent.bytes) == 0);
    CHECK(driver.unmap(base + bytes, {extent}));
    at += extent.bytes;
  }
  CHECK(driver.unmap(base, run));
  for (const Extent& extent : run) driver.release(extent);
  driver.unreserve(base, 2 * bytes);
}

void part_of_a_run_can_be_unmapped(VmmDriver& driver) {
  const size_t page = driver.page_bytes();
  const Run run = {make_extent(driver, 1), make_extent(driver, 2), make_extent(driver, 1)};
  const uintptr_t base = driver.reserve(4 * page);
  driver.map(base, run);
  fill(driver, base, 4 * page, 3);
  CHECK(driver.unmap(base + page, {run[1]}));
  CHECK(writable(base));
  CHECK(!writable(base + page));
  CHECK(!writable(base + 2 * page));
  CHECK(readable(base + 3 * page));
  driver.map(base + page, {run[1]});
  CHECK(writable(base));
  fill(driver, base, page, 3);
  CHECK(filled(driver, base, 4 * page, 3));  // unmapping lost nothing
  CHECK(driver.unmap(base, {run[0], run[1]}));
  CHECK(!writable(base) && !writable(base + 2 * page));
  CHECK(driver.unmap(base + 3 * page, {run[2]}));
  for (const Extent& extent : run) driver.release(extent);
  driver.unreserve(base, 4 * page);
}

void one_extent_can_be_mapped_twice(VmmDriver& driver) {
  const Extent extent = make_extent(driver, 2);
  const uintptr_t base = driver.reserve(2 * extent.bytes);
  driver.map(base, {extent, extent});
  fill(driver, base, extent.bytes, 11);
  CHECK(filled(driver, base + extent.bytes, extent.bytes, 11));
  CHECK(driver.unmap(base, {extent}));
  CHECK(filled(driver, base + extent.bytes, extent.bytes, 11));
  CHECK(driver.unmap(base + extent.bytes, {extent}));
  driver.release(extent);
  driver.unreserve(base, 2 * extent.bytes);
}

void an_address_can_be_used_again(VmmDriver& driver) {
  const Extent a = make_extent(driver, 1);
  const Extent b = make_extent(driver, 1);
  const uintptr_t base = driver.reserve(a.bytes);
  for (int round = 0; round < 3; ++round) {
    driver.map(base, {a});
    fill(driver, base, a.bytes, 1);
    CHECK(driver.unmap(base, {a}));
    driver.map(base, {b});
    CHECK(round == 0 || filled(driver, base, b.bytes, 2));
    fill(driver, base, b.bytes, 2);
    CHECK(driver.unmap(base, {b}));
  }
  driver.release(a);
  driver.release(b);
  driver.unreserve(base, a.bytes);
}

void an_exported_handle_is_the_same_memory(VmmDriver& driver) {
  const Extent ours = make_extent(driver, 2);
  const uintptr_t base = driver.reserve(2 * ours.bytes);
  const SharedHandle shared = driver.export_handle(ours);
  CHECK((fcntl(shared.fd, F_GETFD) & FD_CLOEXEC) != 0);
  const Extent theirs = {driver.import_handle(shared, ours.bytes), ours.bytes};
  CHECK(close(shared.fd) == 0);
  driver.map(base, {ours, theirs});
  fill(driver, base, ours.bytes, 23);
  CHECK(filled(driver, base + ours.bytes, ours.bytes, 23));
  CHECK(driver.unmap(base, {ours, theirs}));
  driver.release(theirs);
  driver.map(base, {ours});
  CHECK(filled(driver, base, ours.bytes, 23));
  CHECK(driver.unmap(base, {ours}));
  driver.release(ours);
  driver.unreserve(base, 2 * ours.bytes);
}

void fences_of_idle_streams_have_passed(VmmDriver& driver) {
  const Stream stream = static_cast<Stream>(0);
  CHECK(driver.fence_passed(Fence::kNone));
  driver.wait_fence(Fence::kNone);
  driver.stream_wait_fence(stream, Fence::kNone);
  driver.release_fence(Fence::kNone);
  const Fence fence = driver.record_fence(stream);
  CHECK(driver.fence_passed(fence));
  driver.wait_fence(fence);
  driver.stream_wait_fence(stream, fence);
  driver.release_fence(fence);
  driver.synchronize();
}

void a_forked_child_is_refused_and_harmless(VmmDriver& driver) {
  const Extent extent = make_extent(driver, 1);
  const uintptr_t base = driver.reserve(extent.bytes);
  driver.map(base, {extent});
  fill(driver, base, extent.bytes, 42);
  const Fence fence = driver.record_fence(static_cast<Stream>(0));
  CHECK(holds_in_child([&] {
    const bool refuses = throws<DriverError>([&] { driver.create(extent.bytes); }) &&
                         throws<DriverError>([&] { driver.reserve(extent.bytes); }) &&
                         throws<DriverError>([&] { driver.map(base, {extent}); }) &&
                         throws<DriverError>([&] { driver.record_fence(Stream{}); }) &&
                         throws<DriverError>([&] { driver.export_handle(extent); }) &&
                         throws<DriverError>([&] { driver.import_handle({0, 0}, extent.bytes); });
    driver.release_fence(fence);
    const bool unmapped = driver.unmap(base, {extent});
    driver.release(extent);
    driver.unreserve(base, extent.bytes);
    return refuses && unmapped && filled(driver, base, extent.bytes, 42);
  }));
  CHECK(filled(driver, base, extent.bytes, 42));
  driver.release_fence(fence);
  CHECK(driver.unmap(base, {extent}));
  driver.release(extent);
  driver.unreserve(base, extent.bytes);
}

void threads_do_not_disturb_each_other(VmmDriver& driver) {
  std::vector<std::thread> threads;
  std::vector<std::string> problems(4);
  for (size_t id = 0; id < problems.size(); ++id) {
    threads.emplace_back([&driver, &problem = problems[id], id] {
      try {
        for (int round = 0; round < 20; ++round) {
          const Run run = {make_extent(driver, 1), make_extent(driver, 2)};
          const uintptr_t base = driver.reserve(bytes_of(run));
          driver.map(base, run);
          fill(driver, base, bytes_of(run), static_cast<unsigned char>(id * 50));
          const Fence fence = driver.record_fence(static_cast<Stream>(id));
          driver.wait_fence(fence);
          driver.release_fence(fence);
          CHECK(filled(driver, base, bytes_of(run), static_cast<unsigned char>(id * 50)));
          CHECK(driver.unmap(base, run));
          for (const Extent& extent : run) driver.release(extent);
          driver.unreserve(base, bytes_of(run));
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

std::vector<Test> driver_contract(const std::string& prefix, const DriverFactory& open) {
  struct Clause {
    const char* name;
    void (*run)(VmmDriver&);
  };
  const Clause clauses[] = {
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
  std::vector<Test> tests;
  for (const Clause& clause : clauses) {
    tests.push_back({prefix + clause.name, [run = clause.run, open] { run(*open()); }});
  }
  return tests;
}

}  // namespace vattn::test
