"""msModelSlim's layout of a quantized component (26.1.0, and older ones that store FP4 as values): the original names.

A component has a folder, and a linear that was smoothed lies in a wrapper: `X.linear.weight` and `X.div.mul_scale`. A
description beside the weights says what is quantized.
"""

from __future__ import annotations

from mxdit.checkpoint.component import Stored
from mxdit.checkpoint.layout import Folder, Layout
from mxdit.checkpoint.layouts.description import read_described


def recognizes(folder: Folder) -> bool:
    return folder.described and folder.original


def read(folder: Folder) -> Stored:
    return read_described(folder, MODELSLIM.name, lambda name: folder.spec.from_original(name) or name)


MODELSLIM = Layout("modelslim", recognizes, read, scale_alg=0)
