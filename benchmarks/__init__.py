"""Measurements behind every published figure; see README.md.

``python -m`` puts the current folder first into ``sys.path``, and the sources in it
have no compiled module. It moves to the end, so that the installed package is measured.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
for _entry in [entry for entry in sys.path if Path(entry or ".").resolve() == _ROOT]:
    sys.path.remove(_entry)
    sys.path.append(_entry)

#: The command of the installed package; ``python -m pybsp...`` would find the sources.
PYBSP = str(Path(sys.executable).with_name("pybsp"))
