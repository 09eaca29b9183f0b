"""`python -m cofiprune`, the same as the command `cofiprune`."""

import sys

from cofiprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
