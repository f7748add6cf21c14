"""A tiny pipeline of every family, of the real classes of diffusers and transformers, for test_families*.py: a file each.

Sizes keep what matters of the big models: several heads, and linears whose K is one 512 group and a part of another.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import pytest

from mxdit.models import SPECS, ModelSpec
from tiny_families.parts import Tiny

TINY: dict[str, Tiny] = {}  # by the class name of the transformer
for _module in iter_modules(__path__):
    TINY |= getattr(import_module(f"{__name__}.{_module.name}"), "TINY", {})


def tiny_of(spec: ModelSpec) -> Tiny:
    assert spec.transformer in TINY, (
        f"write a tiny {spec.transformer} and its pipelines in a file of tests/tiny_families/"
    )
    return TINY[spec.transformer]


families = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
PIPELINES = [pytest.param(spec, name, id=name) for spec in SPECS.values() for name in spec.pipelines]
pipelines = pytest.mark.parametrize("spec, name", PIPELINES)
NATIVE = [pytest.param(spec, name, id=name) for spec in SPECS.values() for name in tiny_of(spec).native]
