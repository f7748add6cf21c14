"""A text encoder's token table as packed rows."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from mxdit.config import MXConfig
from mxdit.embedding import MXEmbedding
from mxdit.errors import ConfigError, FormatError, ModelError
from mxdit.models import ModelSpec


class TiedLookup(nn.Module):
    """Another module's name for a packed table. It holds no tensor, so that a state dict has the table once."""

    def __init__(self, table: MXEmbedding) -> None:
        super().__init__()
        self._table = (table,)  # no submodule

    def forward(self, ids: Tensor) -> Tensor:
        """As `MXEmbedding`."""
        return self._table[0](ids)


def table_of(config: MXConfig, spec: ModelSpec) -> str | None:
    """The path of the table that the config packs, None where it packs none. ConfigError where the model has none to pack."""
    if config.embedding is None:
        return None
    if not spec.tables:
        raise ConfigError(
            "mxdit packs no token table of this kind of model",
            where=spec.transformer,
            field="embedding",
            got=config.embedding,
            hint="Leave the key out.",
        )
    return spec.tables[0]


def skeleton_table(model: nn.Module, config: MXConfig, path: str) -> MXEmbedding:
    """The packed table in place of the float one at `path`, without numbers. Raises ModelError for one that is no plain table."""
    table = model.get_submodule(path)
    assert isinstance(table, nn.Embedding)
    try:
        return MXEmbedding.like(table, method=str(config.embedding), device="meta", where=path)
    except FormatError as error:
        raise ModelError(error.what, where=path, got=error.got, expected=error.expected, hint=error.hint) from error


def put_table(model: nn.Module, spec: ModelSpec, table: MXEmbedding) -> None:
    """Put a packed table in the place of the float one, under all its names."""
    for path in spec.tables:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, table if path == spec.tables[0] else TiedLookup(table))
    # A file may hold the table under each of its names. In transformers 4 this is a list, in 5 a set.
    known: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or set()
    ignored: Any = type(known)([*known, *(re.escape(f"{path}.weight") for path in spec.tables[1:])])
    model._keys_to_ignore_on_load_unexpected = ignored
    others = tuple(f"{path}." for path in spec.tables[1:])
    for key in ("_tied_weights_keys", "all_tied_weights_keys"):  # what transformers 4 and 5 tie and leave out of files
        tied: Any = getattr(model, key, None)
        if isinstance(tied, dict):
            setattr(model, key, {name: of for name, of in tied.items() if not name.startswith(others)})
        elif isinstance(tied, list):
            setattr(model, key, [name for name in tied if not name.startswith(others)])
