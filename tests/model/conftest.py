"""diffusers and transformers, imported once, with the warnings of their own house left there."""

import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import transformers

diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
