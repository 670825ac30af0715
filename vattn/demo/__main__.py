"""Entry point of ``python -m vattn.demo``."""

import sys

if __name__ == "__main__":
    try:
        from vattn.demo.app import main
    except ModuleNotFoundError as error:
        sys.exit(f"vattn.demo needs {error.name}; install it with: pip install 'vattn[demo]'")
    sys.exit(main())
