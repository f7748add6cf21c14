"""One config, or one policy, for each transformer of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from mxdit.config import MXConfig
from mxdit.config.choices import WHERE
from mxdit.errors import ConfigError

P = TypeVar("P")


def split_keys(keys: Mapping[str, Any], components: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keys that hold for every component, component -> what holds there only), of one object that has both."""
    shared = {key: value for key, value in keys.items() if key not in components}
    return shared, {key: value for key, value in keys.items() if key in components}


def each_of(
    value: Any,
    components: Iterable[str],
    names: Collection[str],
    read: Callable[[Any], P],
    *,
    field: str,
    absent: str = "no such transformer",
) -> dict[str, P]:
    """What each transformer has of a value for all, or of an object with values of their own under their names.

    Args:
        value: what `read` takes, or an object of its keys and of names of transformers, which replace them there.
        components: the transformers that there are.
        names: what transformers are called.
        read: makes of a value, of an empty object too, what a transformer has.
        field: that the value was given as; `absent` is what is wrong with a name that is not one of `components`.

    Raises ConfigError for such a name, and as `read`.
    """
    shared, own = split_keys(value, names) if isinstance(value, Mapping) else (value, {})
    components = list(components)
    for name in own:
        if name not in components:
            raise ConfigError(absent, field=field, got=repr(name), expected=" or ".join(components))
    common = read(shared)
    return {name: read(own[name]) if name in own else common for name in components}


def configs_of(
    components: Iterable[str], method: str | None, keys: Mapping[str, Any], own: Mapping[str, Any] | None = None
) -> dict[str, MXConfig | None]:
    """What each transformer of a pipeline is quantized to.

    Args:
        components: the names of the pipeline's transformers.
        method: format of the weights of all that do not name their own; None takes `quant_method` of `keys`.
        keys: of `MXConfig`, for all of them.
        own: component -> keys that differ there, an MXConfig that replaces all, or None to leave it as it is.

    Returns component -> its config, or None where it is left as it is.

    Raises ConfigError for an unknown method or key, for two methods at once, and for a component that is not there.
    """
    named, own = keys.get("quant_method"), own or {}
    if method is not None and named not in (None, method):
        raise ConfigError(
            "two methods at once",
            where=WHERE,
            got=repr(named),
            expected=repr(method),
            hint="Keep one; a component of its own method gets it by name: transformer_2={'quant_method': ...}.",
        )
    shared = {**keys, "quant_method": named if method is None else method}
    components = list(components)
    unknown = [name for name in own if name not in components]
    if unknown:
        raise ConfigError(
            "a config for a component that the model does not have",
            where=WHERE,
            got=unknown[0],
            expected=" or ".join(components),
        )
    return {name: _config_of(name, shared, own.get(name, {})) for name in components}


def _config_of(component: str, shared: Mapping[str, Any], own: object) -> MXConfig | None:
    if own is None or isinstance(own, MXConfig):
        return own
    if isinstance(own, Mapping):
        return MXConfig.from_dict({**shared, **own})
    raise ConfigError(
        "no config for a component",
        where=component,
        got=repr(own),
        expected="a dictionary of keys, an MXConfig or None",
    )
