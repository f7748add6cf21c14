"""diffusers' own layout: float tensors under its names. What mxdit quantizes, and what every runtime loads."""

from __future__ import annotations

from mxdit.checkpoint.component import Stored
from mxdit.checkpoint.layout import Folder, Layout


def recognizes(folder: Folder) -> bool:
    return folder.named and folder.stated is None


def read(folder: Folder) -> Stored:
    return Stored(folder.path, DIFFUSERS.name, folder.tensors, folder.config)


DIFFUSERS = Layout("diffusers", recognizes, read, quantized=False, common=True)
