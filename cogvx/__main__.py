"""`python -m cogvx`."""

import os
import sys

from .cli import main

# OpenMP reads it when torch is imported, which is when a command runs. By default threads that wait
# spin, and keep other programs, and each other, from the cores: on a busy machine ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if __name__ == "__main__":
    status = main()
    # If Ctrl-C came within an exec of text (a dataclass is made by one), Python remembers it, and
    # python -m ends by the signal whatever main returned. The next exec forgets it.
    exec("")
    sys.exit(status)
