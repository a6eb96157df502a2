"""``python -m lbllm.worker FOLDER``: the process that trains one run. The run store starts it by this name."""

import sys

from lbllm.pipeline.worker import main

if __name__ == "__main__":
    sys.exit(main())
