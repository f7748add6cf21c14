"""Write what docs/supported-models.md says of each family, or with --check say whether it is what the specs say.

python tools/supported_models.py [--check]

Between two marks of that page; the rest is written by hand. Models are built from their published configs without weights.
What is run comes from the tables that the tests run: tests/tiny_families.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill

from mxdit.models import SPECS, UNSUPPORTED, ModelSpec
from mxdit.models.spec import Published
from mxdit.numerics.formats import FORMATS
from mxdit.quantize.sizes import DEGREES, FLOAT, Sizes, published_sizes

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from tiny_families import tiny_of  # noqa: E402

PAGE = ROOT / "docs" / "supported-models.md"
BEGIN = "<!-- `python tools/supported_models.py` writes from here -->\n"
END = "<!-- to here -->\n"
SMALL = 0.001  # shares below it stand in one row
RUNTIMES = {"vllm-omni": "vLLM-Omni", "sglang": "SGLang"}

FAMILIES = """\
## Families

Pipelines that mxdit runs take a request (`mxdit generate`, `mxdit serve`, `Session`), and the tests
run them so. Others are called through diffusers, because they take what no request has, such as a
video to follow: their checkpoints are quantized, packed and loaded all the same, and the tests run
those of the next column, tiny, with arguments of their own. Of those that are not run, the tests
look that they have a component of the family's name. "Quantized" is the share of the transformer's
parameters, of the family's first published model. Further layouts are those of runtimes that look
layers up by names that mxdit knows, of the model's own release, and of GGUF files.
"""

PUBLISHED = f"""\
## Published models

Sizes are of all transformers of a model, in GiB, without text encoders and VAE: what is quantized
in the method, and all else in BF16, also the few modules that diffusers keeps in FP32. They follow
the method's defaults: `mxfp4_dualscale` leaves up to five first blocks in BF16. "Quantized" is the
share of the parameters, with no block left out.

"Ranks" are those of {", ".join(map(str, DEGREES[:-1]))} and {DEGREES[-1]} over which every quantized linear can be split both ways
([numerics.md](numerics.md#55-tensor-parallelism)): by its outputs, whose number the degree divides,
and by its inputs, in whole blocks of 32. A runtime splits each one way, so it may manage more; that
heads can be divided is its own condition.
"""

STAYS = """\
## What stays in 16 bits

For the first published model of each family: the linears that its spec keeps, what is outside the
blocks, and what is no weight of a linear. Shares are of the transformer's parameters.
"""

UNKNOWN = """\
## Not supported

Transformers that diffusers has and mxdit does not know. Errors say the same.
"""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown, whose first line names its columns."""
    names = list(head)
    lines = [names, *rows]
    first, *others = (f"| {' | '.join(cells)} |\n" for cells in lines)
    return "".join((first, "|" + "---|" * len(names) + "\n", *others))


def code(names: Iterable[str]) -> str:
    """Names as code, or a dash for none."""
    return ", ".join(f"`{name}`" for name in names) or "-"


def percent(part: int, whole: int) -> str:
    """A share, which is said to be small where it is."""
    share = part / whole
    return f"{share:.1%}".replace("%", " %") if share == 0 or share >= SMALL else f"< {100 * SMALL:g} %"


def family(spec: ModelSpec, sizes: Sizes) -> list[str]:
    """Its row of the first table."""
    native = tiny_of(spec).native
    layouts = [RUNTIMES[name] for name in spec.runtimes]
    layouts += ["its release"] * bool(spec.original) + ["GGUF"] * bool(spec.gguf)
    return [
        spec.title,
        f"`{spec.transformer}`",
        ", ".join(f"`{name}` ({made.task})" for name, made in spec.pipelines.items()) or "-",
        code(native),
        code(name for name in spec.hosts if name not in native),
        percent(sizes.quantized, sizes.parameters),
        ", ".join(layouts) or "-",
    ]


def model(published: Published, sizes: Sizes) -> list[str]:
    """Its row of the second table."""
    count = published.transformers
    return [
        f"`{published.repository}`",
        str(count),
        f"{count * sizes.parameters / 1e9:.2f} B",
        *(f"{count * sizes.nbytes[name] / 2**30:.2f}" for name in (FLOAT, *FORMATS)),
        percent(sizes.quantized, sizes.parameters),
        ", ".join(map(str, sizes.degrees)) or "-",
    ]


def stays(spec: ModelSpec, sizes: Sizes) -> str:
    """A section of the third part: what a family's first published model has that is not quantized."""
    whole, rows = sizes.parameters, []
    for why in dict.fromkeys(spec.keep.values()):
        globs = [glob for glob, reason in spec.keep.items() if reason == why]
        rows.append([code(globs), percent(sum(sizes.kept.get(glob, 0) for glob in globs), whole), why])
    large = sorted((name for name, n in sizes.outside.items() if n / whole >= SMALL), key=lambda x: -sizes.outside[x])
    rows += [[f"`{name}`", percent(sizes.outside[name], whole), "outside the blocks"] for name in large]
    small = [name for name in sizes.outside if name not in large]
    if small:
        rows.append([code(small), percent(sum(sizes.outside[name] for name in small), whole), "outside the blocks"])
    if sizes.rest:
        rows.append(
            [
                "others in the blocks",
                percent(sizes.rest, whole),
                "biases, norms, tables, convolutions: no weight of a linear",
            ]
        )
    about = f"`{spec.published[0].repository}`; blocks in {code(spec.blocks)}."
    text = f"\n### {spec.title}\n\n{fill(about, 100, break_long_words=False, break_on_hyphens=False)}\n\n"
    text += table(("what", "share", "why"), rows)
    if spec.recipes:
        text += "\n" + table(("who else quantizes it", "what stays there, and why ours differs"), spec.recipes.items())
    return text


def text() -> str:
    """All that is between the two marks."""
    specs = sorted(SPECS.values(), key=lambda spec: spec.title.casefold())
    sizes = {spec.transformer: [published_sizes(spec, made) for made in spec.published] for spec in specs}
    first = {name: of[0] for name, of in sizes.items()}
    models = [model(*row) for spec in specs for row in zip(spec.published, sizes[spec.transformer], strict=True)]
    grouped: dict[str, list[str]] = {}
    for name, why in UNSUPPORTED.items():
        grouped.setdefault(why, []).append(name)
    return (
        "\n".join(
            (
                "",
                FAMILIES,
                table(
                    (
                        "family",
                        "transformer",
                        "pipelines that mxdit runs",
                        "run through diffusers",
                        "not run",
                        "quantized",
                        "further layouts",
                    ),
                    (family(spec, first[spec.transformer]) for spec in specs),
                ),
                PUBLISHED,
                table(
                    ("model", "transformers", "parameters", "BF16", *map("`{}`".format, FORMATS), "quantized", "ranks"),
                    models,
                ),
                STAYS.rstrip("\n") + "\n" + "".join(stays(spec, first[spec.transformer]) for spec in specs),
                UNKNOWN,
                table(("class", "why"), ([code(names), why] for why, names in grouped.items())),
            )
        )
        + "\n"
    )


def page() -> str:
    """The whole page as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + text() + END + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    wanted = page()
    if not parser.parse_args().check:
        PAGE.write_text(wanted)
    elif PAGE.read_text() != wanted:
        print(f"{PAGE} is not what the specs say: run python tools/supported_models.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
