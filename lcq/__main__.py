"""`python -m lcq`."""

import sys

from lcq.cli import main

if __name__ == "__main__":
    sys.exit(main())
