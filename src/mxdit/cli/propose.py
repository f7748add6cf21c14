"""A proposed ModelSpec as a Python file that a person reviews, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from mxdit.cli.console import need
from mxdit.errors import InputError, ModelError
from mxdit.models.skeleton import built

if TYPE_CHECKING:
    from mxdit.models.infer import Proposal


def proposal_of(where: str) -> Proposal:
    """The proposal for a pipeline's transformer, a transformer's directory, or a config.json, by its class in diffusers.

    Raises InputError for a path without one, and ModelError for a class that diffusers does not have or cannot build.
    """
    from mxdit.models.infer import propose

    need("diffusers")
    path = Path(where)
    file = next(
        (file for file in (path, path / "transformer" / "config.json", path / "config.json") if file.is_file()), None
    )
    if file is None:
        raise InputError(
            "no transformer is here",
            where=where,
            expected="a pipeline's directory with transformer/config.json, a transformer's, or a config.json",
        )
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError("not a readable JSON file", where=str(file), got=str(error)) from None
    if not isinstance(config, dict):
        raise InputError("not a JSON object", where=str(file), got=type(config).__name__)
    import diffusers

    name = config.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not hasattr(cls, "from_config") or not hasattr(cls, "forward"):
        raise ModelError(
            "diffusers has no model of this class",
            where=str(file),
            got=f"_class_name {name!r}",
            hint="For a class of your own call mxdit.infer_spec on a model of it, which may be on the meta device.",
        )
    return propose(built(cls, config, str(file)))


def as_dict(proposal: Proposal) -> dict[str, Any]:
    """JSON-serializable."""
    spec = proposal.spec
    return {
        "transformer": spec.transformer,
        "blocks": list(spec.blocks),
        "groups": [list(group) for group in spec.groups],
        "keep": dict(spec.keep),
        "components": list(spec.components),
        "shares": dict(proposal.shares),
        "left_out": dict(proposal.left_out),
        "doubts": list(proposal.doubts),
        "inputs": proposal.inputs,
    }


def as_python(proposal: Proposal) -> str:
    """A module of `SPECS`, for a package with an entry point or for src/mxdit/models/families/."""
    spec = proposal.spec
    lines = [
        f'"""{spec.transformer}, as mxdit proposes it: review every line."""',
        "",
        "from mxdit.models.spec import ModelSpec",
        "",
        *_comment(f"One forward was watched, with {proposal.inputs}."),
        *(line for doubt in proposal.doubts for line in _comment(f"Not told: {doubt}.")),
        "FAMILY = ModelSpec(",
        f'    title="{spec.title}",  # what people call it',
        f'    transformer="{spec.transformer}",',
        "    blocks=(",
        *(f'        "{path}",  # {share:.1%} of the weights of all linears' for path, share in proposal.shares.items()),
        "    ),",
        *(f"    # Left out: {path}: {why}." for path, why in proposal.left_out.items()),
    ]
    if spec.groups:
        lines += ["    # Each is given one tensor.", "    groups=("]
        lines += [f"        ({', '.join(json.dumps(name) for name in group)})," for group in spec.groups] + ["    ),"]
    if spec.keep:
        lines += ["    keep={"]
        lines += [f"        {json.dumps(name)}: {json.dumps(why)}," for name, why in spec.keep.items()] + ["    },"]
    lines += [
        f"    components=({', '.join(map(json.dumps, spec.components))},),  # what its pipelines call it: a cascade has several",
        ")",
        "SPECS = (FAMILY,)",
    ]
    return "\n".join(lines)


def _comment(text: str) -> list[str]:
    """Lines of a comment, a hundred characters each."""
    return [f"# {line}" for line in wrap(text, 98)]
