"""`python -m bench`, the command `bench` for launchers that start a module (torchrun)."""

import sys

from bench.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
