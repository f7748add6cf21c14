"""Which modes an evaluation compares: the standard ones, and those that a user names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mxdit.config import MXConfig, near_names
from mxdit.errors import ConfigError, InputError
from mxdit.models import COMPONENTS


@dataclass(frozen=True)
class Mode:
    """One way to run the model.

    Attributes:
        name: what results call it.
        method: format of the weights; None for BF16, and for a directory, which says its own.
        keys: more keys of MXConfig, and under an expert's name keys that hold there only.
        how: "float"; "online", quantized while the BF16 model loads; "offline", quantized on disk before.
        directory: the quantized model, where the mode is one.
    """

    name: str
    method: str | None
    keys: Mapping[str, Any] = field(default_factory=dict)
    how: str = "online"
    directory: Path | None = None

    @property
    def components(self) -> dict[str, Any]:
        """The keys that hold for one expert only, by its name."""
        return {name: self.keys[name] for name in COMPONENTS if name in self.keys}

    @property
    def common(self) -> dict[str, Any]:
        """The keys that hold for every expert."""
        return {key: value for key, value in self.keys.items() if key not in COMPONENTS}


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
            expert under "transformer" and "transformer_2", which is quantized while it loads.

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
            raise InputError("no such mode", where="--modes", got=repr(pattern), expected=", ".join(names), hint=hint)
        chosen |= found
    modes = [mode for mode in STANDARD if mode.name in chosen]
    for text in custom:
        modes.append(_custom(text))
        if modes[-1].name in {mode.name for mode in modes[:-1]}:
            raise InputError("two modes of one name", where="--mode", got=repr(modes[-1].name))
    return tuple(modes)


def _custom(text: str) -> Mode:
    name, equals, value = (part.strip() for part in text.partition("="))
    form = "NAME=DIR or NAME={JSON of config keys}"
    if not (name and equals and value):
        raise InputError("not a mode", where="--mode", got=repr(text), expected=form)
    if not value.startswith("{"):
        directory = Path(value)
        if not (directory / "model_index.json").is_file():
            raise InputError("no such model", where=f"--mode {name}", got=repr(value), expected=form)
        return Mode(name, None, how="offline", directory=directory)
    try:
        keys = json.loads(value)
    except ValueError as error:
        raise InputError("not JSON", where=f"--mode {name}", got=str(error), expected=form) from None
    method = keys.pop("quant_method", None)
    if method is None:
        raise ConfigError("no quant_method", where=f"--mode {name}", expected="mxfp4, mxfp4_dualscale or mxfp8")
    mode = Mode(name, method, keys)
    for expert, part in mode.components.items():
        if not isinstance(part, Mapping | None):
            form = "an object of config keys, or null"
            raise ConfigError(f"no config for {expert}", where=f"--mode {name}", got=repr(part), expected=form)
    for own in (mode.common, *(mode.common | part for part in mode.components.values() if part is not None)):
        MXConfig.of({"quant_method": method, **own})  # a wrong key is said before anything runs
    return mode
