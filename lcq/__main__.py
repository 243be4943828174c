"""`python -m lcq`."""

import sys

from lcq.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
