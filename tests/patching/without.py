"""pytest where a package is as if it were not installed: python -m tests.patching.without NAME ...

diffusers 0.33 does not import beside a torchao of today. In one process: workers would not know.
"""

import importlib.util
import sys

import pytest

if __name__ == "__main__":
    missing, *arguments = sys.argv[1:]
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *of: None if name == missing else found(name, *of)
    sys.exit(pytest.main(arguments))
