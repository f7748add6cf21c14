"""The documents are what they say: links, commands, Python, the tree, and lines that fit a screen."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import textwrap
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from typer.main import get_command

import mxdit
from mxdit.cli import app

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mxdit"
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"), ROOT / "models" / "README.md"]
)
WIDTH = 100
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
OLD = ("--quantization", "--quantization-config", "generate -m ", "--model DIR")  # spellings of 0.1

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(text: str) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", text)


def blocks(text: str, *languages: str) -> list[str]:
    return [textwrap.dedent(code) for language, code in FENCE.findall(text) if language in languages]


def anchors(text: str) -> set[str]:
    """Where links into a page can lead, as GitHub makes them of its headings."""
    titles = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in HEADING.findall(prose(text))]
    return {re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFC", t).lower()).replace(" ", "-") for t in titles}


def commands(text: str) -> list[list[str]]:
    """Every call of `mxdit` in a shell script, as words."""
    lines = text.replace("\\\n", " ").splitlines()
    calls = [shlex.split(line, comments=True) for line in lines if re.match(r"\s*mxdit ", line)]
    return [call[1:] for call in calls]


def parsed(words: list[str]) -> None:
    """Let the console's own parser read a call of `mxdit`; nothing is run. Raises where it does not understand."""
    command, name = get_command(app), "mxdit"
    context = command.make_context(name, words[:1])
    while isinstance(command, typer.core.TyperGroup):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, list(words), parent=context)


# -- how pages look ----------------------------------------------------------------------------------------------------


@each_page
def test_prose_is_wrapped(page):
    wide = [line for line in prose(page.read_text()).splitlines() if len(line) > WIDTH and not line.startswith("|")]
    assert not wide


@each_page
def test_lists_and_tables_begin_after_an_empty_line(page):
    """GitHub does not need it; the site does."""
    lines = prose(page.read_text()).splitlines()
    for above, line in pairwise(lines):
        if line.startswith("|"):
            assert not above.strip() or above.startswith("|"), line
        if re.match(r"[-*] ", line):
            assert not above.strip() or re.match(r"([-*] |  )", above), line


# -- where they lead ---------------------------------------------------------------------------------------------------


@each_page
def test_links_lead_somewhere(page):
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page.read_text()))):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_every_page_is_in_the_index_and_on_the_site():
    index, site = (ROOT / "docs" / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    listed = {(ROOT / "docs" / link).resolve() for link in LINK.findall(index)}
    shown = {ROOT / page for page in re.findall(r"[\w./-]+\.md", site.split("\nnav:")[1])}
    pages = {page for page in PAGES if page.parent != ROOT / "models"}
    assert shown == pages
    assert listed == pages - {ROOT / "docs" / "README.md"}


# -- what they tell readers to type ------------------------------------------------------------------------------------


@each_page
def test_commands_are_understood(page):
    for script in blocks(page.read_text(), "sh"):
        for words in commands(script):
            parsed(words)


@pytest.mark.parametrize("script", sorted(ROOT.glob("examples/*.sh")), ids=lambda script: script.name)
def test_commands_of_examples_are_understood(script):
    calls = commands(script.read_text())
    assert calls
    for words in calls:
        parsed([word for word in words if word != "$@"])


@each_page
def test_commands_in_a_sentence_are_understood(page):
    """`mxdit bench memory DIR` and the like: the command and its options exist."""
    for span in re.findall(r"`(mxdit [^`]*)`", page.read_text()):
        words = [word for word in shlex.split(span)[1:] if word not in ("...", "COMMAND")]
        command = get_command(app)
        while words and isinstance(command, typer.core.TyperGroup) and not words[0].startswith("-"):
            assert words[0] in command.commands, span
            command = command.commands[words.pop(0)]
        known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("-")} <= known, span


@each_page
def test_no_old_spelling(page):
    if page.name not in ("CHANGELOG.md", "serving-vllm-omni.md"):  # what changed; options of another program
        assert not [old for old in OLD if old in page.read_text()]


def test_a_wrong_command_is_noticed():
    parsed(["bench", "gemm", "--quick"])
    for words in (["bench", "nothing"], ["inspect"], ["inspect", "DIR", "--nothing"], ["quantize", "A"]):
        with pytest.raises(Exception, match=r"(?i)no such|missing|unexpected"):
            parsed(words)


@each_page
def test_python_compiles_and_names_what_there_is(page):
    for code in blocks(page.read_text(), "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mxdit"):
                for alias in node.names:
                    assert hasattr(importlib.import_module(node.module), alias.name), alias.name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mxdit":
                assert hasattr(mxdit, node.attr), node.attr


def test_public_names_are_listed():
    text = (ROOT / "docs" / "using.md").read_text().split("## Public names")[1]
    named = set(re.findall(r"`(?:mxdit\.)?(\w+)`", text.replace("`, `", "` `")))
    assert set(mxdit.__all__) - {"__version__"} <= named


# -- the tree ----------------------------------------------------------------------------------------------------------


def test_the_tree_is_the_repository():
    """docs/architecture.md: what it names exists, and where it names one file of a folder it names them all."""
    (tree,) = [code for code in blocks((ROOT / "docs" / "architecture.md").read_text(), "") if "src/mxdit/" in code]
    named, parents = set(), [ROOT]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth + 1 :] = [parents[depth] / line.split()[0]]
        named.add(parents[-1])
    assert not [str(path) for path in named if not path.exists()]
    for folder in {path.parent for path in named if path.is_relative_to(SOURCE)} - {SOURCE.parent}:
        modules = [path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
        missing = [path.name for path in modules if not path.name.startswith("__") and path.name not in tree]
        assert not missing, folder


def test_make_test_omni_has_the_oldest_diffusers():
    oldest = re.search(r'"diffusers>=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    pinned = re.search(r"^diffusers==(.+)$", (ROOT / "tests" / "omni" / "requirements.txt").read_text(), re.MULTILINE)
    assert oldest and pinned and pinned[1] == f"{oldest[1]}.0"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_what_is_tracked_stays_small():
    """Below 60 MiB, of which the bundled models are 51.5: what somebody copies to a borrowed device is all of it."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    paths = [ROOT / os.fsdecode(name) for name in tracked if name]
    assert len(paths) > 500
    assert sum(path.lstat().st_size for path in paths if path.is_symlink() or path.exists()) < 60 << 20
