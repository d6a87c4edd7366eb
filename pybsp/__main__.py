"""``python -m pybsp`` is the ``pybsp`` command."""

import sys

from .cli.main import main

sys.exit(main())
