"""``python -m lbllm``: the command line."""

import sys

from lbllm.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
