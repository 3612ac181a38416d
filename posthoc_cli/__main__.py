"""`python -m posthoc_cli`: the same as `posthoc`."""

import sys

from posthoc_cli.cli import main

if __name__ == "__main__":
    sys.exit(main())
