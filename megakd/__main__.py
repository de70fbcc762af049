"""`python -m megakd VERB ...`, which is how torchrun starts it."""

import sys

from megakd.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
