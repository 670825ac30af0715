"""Build the extension if it is not there, without which nothing else can be imported; then run."""

import sys
import time

from benchmarks.gpu_suite.bootstrap import ensure_built

started = time.monotonic()
if not ensure_built(sys.argv[1:]):
    sys.exit(1)

from benchmarks.gpu_suite.command import main  # noqa: E402 (it needs the extension)

sys.exit(main(started=started))
