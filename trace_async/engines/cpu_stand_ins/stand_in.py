"""Make a package importable to any depth. Whatever is called in it raises NotImplementedError."""

import importlib.abc
import importlib.machinery
import sys
import types


class _Missing(type):
    """The type of a stand-in. It is a class, so that it can be a type hint, a base class or a decorator's argument."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(cls.__module__, f"{cls.__name__}.{name}")

    def __call__(cls, *args: object, **kwargs: object) -> object:
        raise NotImplementedError(f"{cls.__module__}.{cls.__name__} is only a stand-in on the CPU")


def _missing(module: str, name: str) -> _Missing:
    return _Missing(name, (), {"__module__": module})


class _StandInModule(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(self.__name__, name)


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str) -> None:
        self._prefix = package + "."

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith(self._prefix) else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def stand_in_for(package: str) -> None:
    """Turn the module `package`, which exists already, into a stand-in with all its submodules."""
    sys.modules[package].__class__ = _StandInModule
    sys.meta_path.append(_StandInFinder(package))
