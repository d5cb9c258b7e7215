"""`python -m bench.cli`, as launchers of several processes start it."""

import sys

from bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
