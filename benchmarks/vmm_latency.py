"""``vattn bench latency``, results in benchmarks/results."""

import sys

from benchmarks import RESULTS
from vattn.bench.latency.command import main

if __name__ == "__main__":
    words = ["--out", str(RESULTS), *sys.argv[1:]]
    sys.exit(main(words, prog="python -m benchmarks.vmm_latency"))
