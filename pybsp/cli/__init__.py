"""The ``pybsp`` command: one module a command, shared parts beside them."""
