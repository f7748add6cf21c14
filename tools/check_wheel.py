"""`make wheel`: build both packages, install them as users do, and make a clip with each installation.

    python tools/check_wheel.py [--dist dist]

1. `python -m build` makes an sdist of mxdit and of mxdit-models, and from each sdist, not from the checkout, its wheel.
   `twine check` reads them, and mxdit's sdist has to hold the tracked files of `src` and `csrc`, no more and no fewer.
2. Every row of `CASES` gets an environment of its own. Only torch is shared (the version of `constraints.txt`, and what
   torch itself brings): mxdit, its models, diffusers and every other package come from the files that were built and from
   what those files say they need.
3. In a directory outside the checkout it runs `mxdit info`, which without a compiler must say so; `mxdit generate`, T2V and
   I2V, four-bit, two steps, whose clips must have pictures in them; and `mxdit quantize`, whose weights must be the same
   bytes in every environment. mxdit, mxdit_models and diffusers must be those of that environment.

Prints a line a step and a table; what went wrong stands above the table, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"mxdit": ROOT, "mxdit_models": ROOT / "models"}
COMPILERS = ("CC", "CXX")
WHERE = """
import json, diffusers, mxdit, mxdit_models, torch, transformers
from importlib.resources import files
print(json.dumps({
    "places": [module.__file__ for module in (mxdit, mxdit_models, diffusers)],
    "typed": all(files(module).joinpath("py.typed").is_file() for module in (mxdit, mxdit_models)),
    "library": any(file.name.startswith("libmxdit_cpu") for file in files("mxdit.backends").iterdir()),
    "versions": [module.__version__ for module in (mxdit, torch, diffusers, transformers)],
    "models": str(files(mxdit_models)),
}))
"""
LOOK = """
import sys, av, numpy
with av.open(sys.argv[1]) as clip:
    frames = numpy.stack([frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)])
assert frames.shape == (5, 64, 64, 3) and frames.std() > 10, (frames.shape, frames.std())
"""


@dataclass(frozen=True)
class Case:
    """One way to install: which files, beside which diffusers ("oldest" or "newest" of those mxdit names), and with what."""

    name: str
    mxdit: str
    models: str
    diffusers: str = "newest"
    compiler: bool = True

    @property
    def kernels(self) -> bool:
        """Whether the native library has to be there: it was compiled here, or is in the wheel."""
        return self.compiler or self.mxdit == ".whl"


CASES = (
    Case("sdist, compiler", ".tar.gz", ".tar.gz"),
    Case("sdist, no compiler", ".tar.gz", ".whl", compiler=False),
    Case("wheel, oldest diffusers", ".whl", ".whl", diffusers="oldest", compiler=False),
    Case("wheel, newest diffusers", ".whl", ".whl", compiler=False),
)


class Failed(Exception):
    """A step that did not do what it had to."""


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """What the command prints. It sees none of the caller's Python settings. Raises Failed where it fails."""
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith("PYTHON") and key not in COMPILERS
    }
    inherited |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONNOUSERSITE": "1", "COLUMNS": "100"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        raise Failed(f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{said}")
    return done.stdout


def environment(path: Path, *packages: object, beside: Path | None = None, **settings: str) -> Path:
    """A new environment with these packages, which also sees those of `beside`. Returns its `bin`."""
    run(sys.executable, "-m", "venv", path)
    if beside:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        shared = beside / "lib" / version / "site-packages"
        (path / "lib" / version / "site-packages" / "beside.pth").write_text(f"{shared}\n")
    pip = (path / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt")
    run(*pip, *packages, **settings)
    return path / "bin"


def build(scratch: Path, dist: Path) -> None:
    """Both packages' sdists and wheels in `dist`, in place of any that were there."""
    for old in dist.glob("mxdit*"):
        old.unlink()
    tools = environment(scratch / "tools", "build", "twine")
    for name, source in PACKAGES.items():
        run(tools / "python", "-m", "build", "--outdir", dist, source)
        for file in sorted(dist.glob(f"{name}-*")):
            print(f"  {file.name}: {file.stat().st_size / 1e6:.2f} MB")
    run(tools / "python", "-m", "twine", "check", "--strict", *dist.iterdir())
    with tarfile.open(artifact(dist, "mxdit", ".tar.gz")) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(run("git", "ls-files", "src", "csrc").splitlines())
    if difference := sorted(tracked ^ {name for name in held if name.startswith(("src/", "csrc/"))}):
        raise Failed(f"the sdist does not hold what is tracked: {', '.join(difference)}")


def artifact(dist: Path, name: str, suffix: str) -> Path:
    """The one file of that package and kind."""
    (file,) = dist.glob(f"{name}-*{suffix}")
    return file


def oldest_diffusers() -> str:
    """The requirement that takes the oldest release that mxdit's own requirement lets in."""
    lower = re.search(r'"diffusers>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    if lower is None:
        raise Failed("pyproject.toml names no oldest diffusers")
    return f"diffusers=={lower.group(1)}.*"


def check(case: Case, scratch: Path, dist: Path, torch: Path) -> list[str]:
    """Install as the case says, and use it. Returns the row of the table."""
    started = time.perf_counter()
    settings = {}
    if not case.compiler:  # CMake looks in /usr/bin whatever PATH says, but takes CC and CXX at their word
        (scratch / "nothing").mkdir(exist_ok=True)
        settings = {"PATH": str(scratch / "nothing"), **dict.fromkeys(COMPILERS, str(scratch / "nothing" / "compiler"))}
    home = scratch / case.name.replace(", ", "-").replace(" ", "-")
    packages = [f"{artifact(dist, 'mxdit', case.mxdit)}[diffusers,video]", artifact(dist, "mxdit_models", case.models)]
    packages += [oldest_diffusers()] if case.diffusers == "oldest" else []
    binaries = environment(home, *packages, beside=torch, **settings)
    installed = time.perf_counter()

    outside = home / "elsewhere"
    outside.mkdir()
    found = json.loads(run(binaries / "python", "-W", "ignore", "-c", WHERE, cwd=outside).splitlines()[-1])
    strangers = [place for place in found["places"] if not Path(place).is_relative_to(home)]
    info = run(binaries / "mxdit", "info", cwd=outside)
    (cpu,) = (line for line in info.splitlines() if line.startswith("backend cpu"))
    problems = {
        f"imported from elsewhere: {', '.join(strangers)}": strangers,
        "py.typed is missing": not found["typed"],
        f"the native library is {'there' if found['library'] else 'missing'}": found["library"] is not case.kernels,
        f"`mxdit info` says: {cpu}": ("path " in cpu) is not case.kernels or ("compiler" in cpu) is case.kernels,
    }
    if wrong := [said for said, holds in problems.items() if holds]:
        raise Failed("; ".join(wrong))

    models, method = Path(found["models"]), ["--method", "mxfp4_dualscale"]
    short = [*method, "--steps", "2", "--frames", "5", "--output", "clip.mp4"]
    for image in ([], ["--image", models / "first_frame.png"]):
        run(binaries / "mxdit", "generate", *short, *image, cwd=outside)
        run(binaries / "python", "-c", LOOK, "clip.mp4", cwd=outside)
    run(binaries / "mxdit", "quantize", models / "t2v", "quantized", *method, cwd=outside)
    weights = hashlib.sha256()
    for file in sorted((outside / "quantized").glob("transformer*/*.safetensors")):
        weights.update(file.read_bytes())
    ended = time.perf_counter()
    path = cpu.partition("path ")[2].partition(";")[0] or "reference"
    times = [f"{installed - started:.0f}", f"{ended - installed:.0f}"]
    return [case.name, *found["versions"], path, weights.hexdigest()[:8], *times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where the sdists and wheels go")
    dist = parser.parse_args().dist.resolve()
    rows = [
        ["installation", "mxdit", "torch", "diffusers", "transformers", "CPU path", "weights", "install s", "use s"]
    ]
    failures = []
    with tempfile.TemporaryDirectory(prefix="mxdit-wheel-") as folder:
        scratch = Path(folder).resolve()
        try:
            print("building", flush=True)
            build(scratch, dist)
            print("installing torch", flush=True)
            environment(scratch / "torch", "torch")
        except Failed as failure:
            sys.exit(f"FAILED: {failure}")
        for case in CASES:
            print(case.name, flush=True)
            try:
                rows.append(check(case, scratch, dist, scratch / "torch"))
            except Failed as failure:
                failures.append(f"FAILED: {case.name}: {failure}")
                rows.append([case.name, "FAILED", *[""] * (len(rows[0]) - 2)])
    if len({row[6] for row in rows[1:] if row[6]}) > 1:
        failures.append("FAILED: the same weights, quantized, are other bytes in another environment")
    print("\n" + "\n\n".join([*failures, ""]), end="")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
