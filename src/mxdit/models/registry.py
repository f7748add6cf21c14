"""The registry of model families: those of `mxdit.models.families`, of other packages, and of `register_family`.

Another package adds its own with an entry point in the group ``mxdit.families``, whose value is a `ModelSpec` or a tuple of
them (docs/adapting-a-model.md). It is imported when a family is first looked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import overload

from mxdit.errors import ModelError, MXDiTError
from mxdit.models import families
from mxdit.models.spec import ModelSpec

logger = logging.getLogger(__name__)
GROUP = "mxdit.families"  # of entry points, whose values are a ModelSpec each, or a tuple of them
# What a broken package raises when it is imported.
_BROKEN = (
    ImportError,
    AttributeError,
    OSError,
    SyntaxError,
    NameError,
    TypeError,
    ValueError,
    LookupError,
    RuntimeError,
)


class Families(MutableMapping[str, ModelSpec]):
    """Specs by the class name of the transformer. Those of other packages are imported when one is first looked for."""

    def __init__(self) -> None:
        self._specs: dict[str, ModelSpec] = {}
        self.waiting = True  # for the first look

    @property
    def _all(self) -> dict[str, ModelSpec]:
        if self.waiting:
            self.waiting = False
            for point in entry_points(group=GROUP):
                _register_installed(point, own=set(self._specs))
        return self._specs

    def __getitem__(self, name: str) -> ModelSpec:
        return self._all[name]

    def __setitem__(self, name: str, spec: ModelSpec) -> None:
        self._specs[name] = spec

    def __delitem__(self, name: str) -> None:
        del self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


class Components(Sequence[str]):
    """Every name that a pipeline of any family gives a transformer."""

    @property
    def _all(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for spec in SPECS.values() for name in spec.components))

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...

    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self._all[index]

    def __len__(self) -> int:
        return len(self._all)


SPECS = Families()
COMPONENTS = Components()


def register_family(spec: ModelSpec) -> None:
    """Let mxdit know a family, in place of one of the same transformer class; docs/adapting-a-model.md says how to write it.

    Raises ModelError for a task of its pipelines that no preset fits whatever the model, or pipelines without a geometry.
    """
    for task in {called.task for called in spec.pipelines.values()}:
        if spec.geometry is None or not any(
            p.task == task and not p.config and p.components is None for p in spec.presets
        ):
            raise ModelError(
                "the ModelSpec cannot run its pipelines",
                where=spec.transformer,
                expected=f"a geometry, and for {task!r} a last preset that fits any model of the family",
                hint="docs/adapting-a-model.md has the fields.",
            )
    SPECS[spec.transformer] = spec


def _register_installed(point: EntryPoint, own: set[str]) -> None:
    """Let mxdit know the families of another package. One that is broken is said and passed over: others are to work."""
    package = point.dist.name if point.dist else point.module
    try:
        found = point.load()
        for spec in found if isinstance(found, tuple) else (found,):
            if not isinstance(spec, ModelSpec):
                raise TypeError(f"got {spec!r}, expected a ModelSpec or a tuple of them")
            if spec.transformer in own:
                raise ValueError(f"mxdit has a ModelSpec of {spec.transformer}; register_family takes its place")
            register_family(spec)
    except (*_BROKEN, MXDiTError) as error:
        said = f"{type(error).__name__}: {error}"
        logger.warning("the package %s brings no model family (%s: %s): %s", package, GROUP, point.value, said)


_own = [
    spec
    for module in iter_modules(families.__path__)
    for spec in import_module(f"{families.__name__}.{module.name}").SPECS
]
# Those whose releases mxdit reads come first: they are told from others by their tensors, and the first of all where a file
# has the names of diffusers, which says nothing of the family.
for _spec in sorted(_own, key=lambda spec: not spec.original):
    register_family(_spec)


def tasks() -> tuple[str, ...]:
    """Everything that a model of some family can be asked to make: "t2v", "i2v", "t2i"."""
    return tuple(dict.fromkeys(made.task for spec in SPECS.values() for made in spec.pipelines.values()))
