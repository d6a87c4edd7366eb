"""Registration with transformers in fresh processes, for every order of imports."""

import subprocess
import sys
import warnings

import pytest

from pybsp import integrations

CHECK = """
def check():
    import inspect, transformers.quantizers
    from transformers.quantizers import auto
    from pybsp.integrations import transformers as ours
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["pybsp"] is ours.BlockSparseConfig
    assert auto.AUTO_QUANTIZER_MAPPING["pybsp"] is ours.BlockSparseHfQuantizer
    assert "register_quantizer" in inspect.getsource(transformers.quantizers)
    finders = [type(finder).__name__ for finder in sys.meta_path]
    assert finders.count("_RegisterAfterImport") == 1, finders
"""

ORDERS = {
    "pybsp first, then everything again": """
import importlib, sys, pybsp
assert "transformers" not in sys.modules, "import pybsp imports transformers"
importlib.reload(pybsp.integrations)
pybsp.integrations.register_on_import()
import transformers.quantizers
check()
importlib.reload(pybsp.integrations)
pybsp.integrations.register_on_import()
check()
importlib.reload(pybsp.integrations.transformers)
pybsp.integrations.transformers.register()
check()
del sys.modules["transformers.quantizers"], sys.modules["transformers.quantizers.auto"]
import transformers.quantizers
check()
""",
    "a name of ours that needs transformers first": """
from pybsp import save_packed
check()
""",
    "between the lazy package and its modules": """
import transformers
assert "transformers.quantizers" not in sys.modules
import pybsp
from transformers.quantizers import register_quantizer
check()
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_registered(order):
    code = f"import sys\n{CHECK}{ORDERS[order]}print('done')"
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "done"


def test_registered_at_once_when_transformers_is_loaded(monkeypatch):
    auto = pytest.importorskip("transformers.quantizers").auto
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "pybsp")
    integrations.register_on_import()
    assert "pybsp" in auto.AUTO_QUANTIZER_MAPPING


def test_a_failure_is_a_warning_because_transformers_must_still_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "pybsp.integrations.transformers", None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        integrations._register()
    assert len(seen) == 1
    assert "could not register" in str(seen[0].message)
