"""Which modes an evaluation compares: the standard ones, and those that a user names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mxdit.config.attention import FIELD as ATTENTION
from mxdit.config.attention import AttentionLike, AttentionPolicy
from mxdit.config.choices import near_names
from mxdit.config.components import configs_of, split_keys
from mxdit.config.encoders import encoder_config
from mxdit.errors import ConfigError, InputError, MXDiTError
from mxdit.models import COMPONENTS, TEXT_ENCODERS
from mxdit.numerics.formats import FORMATS


@dataclass(frozen=True)
class Mode:
    """One way to run the model.

    Attributes:
        name: what results call it.
        method: format of the weights; None for BF16, and for a directory, which says its own.
        keys: keys of MXConfig, for every transformer.
        attention: how the transformers compute it.
        fused: whether ops of mxdit compute their norms, rotary embeddings and GELU.
        components: transformer -> keys that differ there, or None to leave it as it is; text encoder -> what it is quantized to.
        how: "float"; "online", quantized while the BF16 model loads; "offline", quantized on disk before.
        directory: the quantized model, where the mode is one.
    """

    name: str
    method: str | None
    keys: Mapping[str, Any] = field(default_factory=dict)
    how: str = "online"
    directory: Path | None = None
    components: Mapping[str, Any] = field(default_factory=dict)
    attention: AttentionLike | None = None
    fused: bool = False


BF16 = Mode("bf16", None, how="float")  # the reference, first in every evaluation
STANDARD = (
    BF16,
    Mode("mxfp8 online", "mxfp8"),
    Mode("mxfp8 offline", "mxfp8", how="offline"),
    Mode("mxfp4 uos online", "mxfp4", {"mxfp4_scale_alg": 2}),
    Mode("mxfp4 ocp online", "mxfp4", {"mxfp4_scale_alg": 0}),
    Mode("mxfp4 w4a8 online", "mxfp4", {"activation": "mxfp8"}),
    Mode("mxfp4 w4a16 online", "mxfp4", {"activation": "bf16"}),
    Mode("mxfp4_dualscale online", "mxfp4_dualscale"),
    Mode("mxfp4_dualscale offline", "mxfp4_dualscale", how="offline"),
)
QUICK = ("mxfp8 online", "mxfp4 uos online", "mxfp4_dualscale online")


def choose(patterns: Sequence[str] | None, custom: Sequence[str] = ()) -> tuple[Mode, ...]:
    """BF16, the standard modes that `patterns` name, and custom ones, in this order.

    Args:
        patterns: names of `STANDARD`, globs of them, or their first words ("mxfp8"); None takes all, [] none.
        custom: each NAME=DIR, a directory that holds the model quantized, or NAME={...}, JSON of MXConfig's keys, also per
            expert under "transformer" and "transformer_2", and of a text encoder under "text_encoder", "text_encoder_2", ...,
            which is quantized while it loads; a text encoder alone, where there is no "quant_method". "attention" is a policy
            of attention, or has one per expert, and "fused" is true or false, also of BF16.

    Raises:
        InputError: a pattern that names nothing, a custom mode that is neither, or two of one name.
        ConfigError: keys that mean nothing.
    """
    chosen = {BF16.name}
    for pattern in ["*"] if patterns is None else patterns:
        found = {mode.name for mode in STANDARD if fnmatchcase(mode.name, pattern) or mode.name.split()[0] == pattern}
        if not found:
            names = [mode.name for mode in STANDARD]
            hint = near_names(pattern, names)
            raise InputError("no such mode", field="modes", got=repr(pattern), expected=", ".join(names), hint=hint)
        chosen |= found
    modes = [mode for mode in STANDARD if mode.name in chosen]
    for text in custom:
        modes.append(_custom(text))
        if modes[-1].name in {mode.name for mode in modes[:-1]}:
            raise InputError("two modes of one name", field="mode", got=repr(modes[-1].name))
    return tuple(modes)


@contextmanager
def of_mode(name: str) -> Iterator[None]:
    """Inside, an error about a field is one about that key of a mode, which is where a user has it from."""
    try:
        yield
    except MXDiTError as error:
        where = " ".join(filter(None, (name, error.field, error.where)))
        parts = {"got": error.got, "expected": error.expected, "hint": error.hint}
        raise type(error)(error.what, field="mode", where=where, **parts) from None


def _custom(text: str) -> Mode:
    name, equals, value = (part.strip() for part in text.partition("="))
    form = "NAME=DIR or NAME={JSON of config keys}"
    if not (name and equals and value):
        raise InputError("not a mode", field="mode", got=repr(text), expected=form)
    if not value.startswith("{"):
        directory = Path(value)
        if not (directory / "model_index.json").is_file():
            raise InputError("no such model", field="mode", where=name, got=repr(value), expected=form)
        return Mode(name, None, how="offline", directory=directory)
    try:
        keys = json.loads(value)
    except ValueError as error:
        raise InputError("not JSON", field="mode", where=name, got=str(error), expected=form) from None
    method = keys.pop("quant_method", None)
    attention, fused = keys.pop(ATTENTION, None), keys.pop("fused", False)
    with of_mode(name):
        AttentionPolicy.of_each(attention, COMPONENTS, COMPONENTS)
        if not isinstance(fused, bool):
            raise ConfigError("neither true nor false", field="fused", got=repr(fused))
    keys, encoders = split_keys(keys, TEXT_ENCODERS)
    for component, of in encoders.items():
        encoder_config(of, component)
    if method is None and not keys and (encoders or attention is not None or fused):
        return Mode(name, None, components=encoders, attention=attention, fused=fused)
    if method is None:
        raise ConfigError("no quant_method", field="mode", where=name, expected=" or ".join(FORMATS))
    shared, own = split_keys(keys, COMPONENTS)
    configs_of(COMPONENTS, method, shared, own)  # a wrong key is said before anything runs
    return Mode(name, method, shared, components={**own, **encoders}, attention=attention, fused=fused)
