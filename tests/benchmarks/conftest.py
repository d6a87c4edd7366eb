"""The benchmarks lie beside the sources, which must not hide the installed package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
