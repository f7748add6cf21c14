"""A hook of mkdocs: the repository's pages, and the files that they link to, under their paths in the repository.

mkdocs takes one folder of pages. Ours are in docs/ and at the root, and link to each other and to files beside them, such
as LICENSE, by relative paths, as GitHub wants them.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
SHOWN = ("*.md", "LICENSE", "docs/**/*", "examples/*")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put what the site shows in the place of docs/ alone; files of the theme stay."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    shown = sorted({path for pattern in SHOWN for path in ROOT.glob(pattern) if path.is_file()})
    ours = [File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)) for path in shown]
    return Files(theme + ours)
