"""``python -m lbllm.evaluation FOLDER``: the process that works on one evaluation. Its store starts it by this name."""

import sys

from lbllm.evaluation.worker import main

if __name__ == "__main__":
    sys.exit(main())
