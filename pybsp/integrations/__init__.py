"""Connections to other libraries, which are imported only when the user does.

``register_on_import`` teaches transformers the quantization method ``"pybsp"``.
Importing transformers takes seconds, so ``import pybsp`` does not: when transformers is
not there yet, a finder waits on ``sys.meta_path`` for ``transformers.quantizers``, the
module that holds the registry, and registers right after it has run.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_REGISTRY = "transformers.quantizers"


def register_on_import() -> None:
    """Register with transformers now or, when it is not imported yet, once it is.

    May be called any number of times.
    """
    for finder in list(sys.meta_path):
        # By name: a reloaded module has a new class.
        if type(finder).__name__ == _RegisterAfterImport.__name__:
            sys.meta_path.remove(finder)
    sys.meta_path.insert(0, _RegisterAfterImport())
    if hasattr(sys.modules.get(_REGISTRY), "register_quantizer"):
        _register()


def _register() -> None:
    ours = sys.modules.get(f"{__package__}.transformers")
    if ours is not None and not hasattr(ours, "register"):
        return  # its own import has brought the registry here; it registers at its end
    try:
        importlib.import_module(".transformers", __package__).register()
    except Exception as error:
        # Raising would break `import transformers` for code that needs no pybsp.
        warnings.warn(
            f"pybsp could not register with transformers ({error!r}): from_pretrained "
            "will load its checkpoints dense or refuse them; install transformers 5",
            RuntimeWarning,
            stacklevel=2,
        )


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing; makes the loader of ``transformers.quantizers`` register."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                _call_after_exec(spec)
                return spec
        return None


def _call_after_exec(spec: importlib.machinery.ModuleSpec) -> None:
    loader = spec.loader
    if loader is None:
        return
    exec_module = loader.exec_module

    def exec_and_register(module: ModuleType) -> None:
        exec_module(module)
        _register()

    # On this one instance, so that the loader keeps its type and other methods.
    loader.exec_module = exec_and_register  # type: ignore[method-assign]
