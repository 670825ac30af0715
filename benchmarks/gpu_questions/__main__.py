"""Ask all questions."""

import sys

from benchmarks.gpu_questions.command import main

sys.exit(main())
