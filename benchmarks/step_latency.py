"""``vattn bench step`` with the C++ program of this folder, results in benchmarks/results."""

import sys

from benchmarks import RESULTS
from benchmarks.cpp_step import measure_cpp
from vattn.bench.step.command import main

if __name__ == "__main__":
    words = ["--out", str(RESULTS), *sys.argv[1:]]
    sys.exit(main(words, prog="python -m benchmarks.step_latency", host_floor=measure_cpp))
