"""The layout of a model's own release: float tensors under the release's names, with a config.json in its own keys.

Names and keys are data of the `ModelSpec`: `original` and `original_config`.
"""

from __future__ import annotations

from mxdit.checkpoint.component import Stored
from mxdit.checkpoint.layout import CONFIG, Folder, Layout
from mxdit.errors import CheckpointError


def recognizes(folder: Folder) -> bool:
    return folder.original and not folder.described and folder.config is not None


def read(folder: Folder) -> Stored:
    spec, shapes = folder.spec, {name: tensor.info.shape for name, tensor in folder.tensors.items()}
    assert spec.original_config is not None and folder.config is not None
    try:
        config = spec.original_config(folder.config, shapes)
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            "the original model's config lacks what describes it", where=str(folder.path / CONFIG), got=repr(error)
        ) from None
    return Stored(folder.path, ORIGINAL.name, folder.renamed(lambda name: spec.from_original(name) or name), config)


ORIGINAL = Layout("original", recognizes, read, quantized=False)
