"""`python -m cogvx`."""

import sys

from .cli import main

if __name__ == "__main__":
    status = main()
    # If Ctrl-C came within an exec of text (a dataclass is made by one), Python remembers it, and
    # python -m ends by the signal whatever main returned. The next exec forgets it.
    exec("")
    sys.exit(status)
