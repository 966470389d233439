"""Distills DSPy programs into small fine-tuned students, on Ray.

    from distill import RayBootstrapFinetune, RayProvider

Importing this package also makes models named ``raydistill/<student>`` known to DSPy, as soon
as DSPy is imported, so that a saved program finds its student. Nothing heavy is imported
before it is needed: the command line starts here.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.optimizer import RayBootstrapFinetune
    from distill.provider import RayProvider

__all__ = ["RayBootstrapFinetune", "RayProvider"]

_HOMES = {"RayBootstrapFinetune": "distill.optimizer", "RayProvider": "distill.provider"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


class _AfterDspy(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers with DSPy at the end of its import, whoever imports it."""

    def __init__(self) -> None:
        self._looking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "dspy" or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking = False
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        sys.meta_path.remove(self)
        _register()


def _register() -> None:
    # It registers when it is imported; it may be what is importing DSPy now.
    importlib.import_module("serve.dspy_lm")


if "dspy" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterDspy())
