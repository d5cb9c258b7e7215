"""`python -m bench.cli`, for launchers of several processes (accelerate, torchrun)."""

import sys

from bench.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
