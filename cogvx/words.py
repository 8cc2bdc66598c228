"""Deprecated: `WordTextEncoder` is in `cogvx.shapes`."""

import warnings

from .shapes import WordTextEncoder as WordTextEncoder

warnings.warn("cogvx.words is now cogvx.shapes", DeprecationWarning, 2)
