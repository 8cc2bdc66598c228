"""Optional packages: what they log of each other while they are imported."""

import logging
import sys
import warnings

import pytest

from cogvx.extras import extra, quiet_imports

NOISE = """
import logging, warnings
logging.getLogger("torchao").warning("a file for another machine")
logging.getLogger("torch.utils._pytree").warning("an Enum subclass")
logging.getLogger("torchao.kernels").error("an error")
warnings.warn("will go", DeprecationWarning)
warnings.warn("careful", UserWarning)
"""


def test_an_import_is_quiet_but_for_errors(tmp_path, monkeypatch, caplog):
    (tmp_path / "noisy_package.py").write_text(NOISE)
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        extra("noisy_package", "a test", "nothing")
    sys.modules.pop("noisy_package")
    assert [record.message for record in caplog.records] == ["an error"]
    assert [str(warning.message) for warning in seen] == ["careful"]


def test_what_comes_later_is_logged(caplog):
    with quiet_imports(), pytest.raises(ValueError):
        with quiet_imports():
            raise ValueError
    logging.getLogger("torchao").warning("later")
    assert [record.message for record in caplog.records] == ["later"]
