"""`mxdit info --families`."""

from __future__ import annotations

import json

from rich.table import Column, Table

from mxdit.cli.console import need, out, say
from mxdit.models import SPECS
from mxdit.quantize.sizes import published_sizes


def show_families(as_json: bool) -> None:
    """Print a row for each family: how much of its first published model's transformer is quantized, and by what it is run."""
    need("diffusers")
    rows = [
        {
            "title": spec.title or spec.transformer,
            "transformer": spec.transformer,
            "pipelines": {name: made.task for name, made in spec.pipelines.items()},
            "hosts": list(spec.hosts),
            "quantized": round(published_sizes(spec, spec.published[0]).share, 4) if spec.published else None,
        }
        for spec in sorted(SPECS.values(), key=lambda spec: (spec.title.casefold(), spec.transformer))
    ]
    if as_json:
        out.print_json(json.dumps({"families": rows}))
        return
    table = Table("family", "makes", "through diffusers", "quantized", Column("transformer", overflow="fold"))
    for row in rows:
        share = "" if row["quantized"] is None else f"{row['quantized']:.1%}"
        table.add_row(
            row["title"],
            ", ".join(dict.fromkeys(row["pipelines"].values())),
            f"{len(row['hosts']) or ''}",
            share,
            row["transformer"],
        )
    out.print(table)
    say("`through diffusers` counts the pipelines that hold the model and take what no request of mxdit has.")
    say("docs/supported-models.md has them, sizes, what stays in 16 bits, and what is not supported.")
