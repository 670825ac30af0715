"""Entry point of ``python -m vattn``."""

import sys

from vattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
