"""The table of layouts: each folder is in one of them; and what the commands say of a directory that is not whole."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import layouts
import original
import tiny
from command import mxdit_command
from mxdit.checkpoint.layouts import LAYOUTS, TARGETS
from mxdit.checkpoint.sources import open_folder
from mxdit.models.families.wan import WAN

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Layout -> folders of components that are in it."""
    root = tmp_path_factory.mktemp("layouts")
    made = layouts.experts(root)
    return {
        "packed": [made[name] for name in ("dual", "mxfp4", "mxfp8")],
        "vllm-omni": [made[f"{name} vllm-omni"] for name in ("dual", "mxfp4", "mxfp8")],
        "sglang": [made[f"{name} sglang"] for name in ("dual", "mxfp4", "mxfp8")],
        "modelslim": [made[f"{name} modelslim"] for name in ("dual", "mxfp4", "mxfp8")],
        "auto-round": [layouts.auto_round(made[name], root / f"{name} auto-round") for name in ("mxfp4", "mxfp8")],
        "original": [made["original"]],
        "diffusers": [made["float"]],
    }


def test_each_folder_is_in_one_layout(folders):
    assert folders.keys() == {name for name, layout in LAYOUTS.items() if layout.suffix is None}
    for name, paths in folders.items():
        for path in paths:
            folder = open_folder(path, WAN, None)
            assert [layout.name for layout in LAYOUTS.values() if layout.recognizes(folder)] == [name], path
            assert LAYOUTS[name].read(folder).layout == name


def test_the_table_of_the_docs_is_the_registry():
    rows = re.findall(r"^\| \*\*(\S+)\*\* \|.*\| (reads.*) \|$", (DOCS / "checkpoints.md").read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(LAYOUTS)
    assert [name for name, does in rows if "writes" in does] == list(TARGETS)


def lose(folder: Path) -> None:
    """One shard of several."""
    (folder / f"{original.STEM}-00002-of-00002.safetensors").unlink()


def lose_all(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()


def rename(folder: Path) -> None:
    layouts.change_json(folder / "config.json", lambda c: c.update(_class_name="AnotherTransformer3DModel"))


MISSING = "-00002-of-00002.safetensors: a file that the index names is missing; got 1 of 2 files missing"
UNKNOWN = "mxdit does not know this kind of model; got 'AnotherTransformer3DModel'"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard": (lose, MISSING),
    "every shard": (lose_all, "-00001-of-00002.safetensors: a file that the index names is missing; got 2 of 2"),
    "a model of another kind": (rename, UNKNOWN),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose transformers lie in two shards."""
    return tiny.save(tmp_path_factory.mktemp("whole") / "wan", max_shard_size="300KB")


@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "component"])
@pytest.mark.parametrize("damage, said", BROKEN.values(), ids=BROKEN.keys())
def test_a_directory_that_is_not_whole_is_one_line(monkeypatch, capsys, pipeline, tmp_path, whole, damage, said):
    source = shutil.copytree(pipeline, tmp_path / "wan")
    damage(source / "transformer")
    directory = source if whole else source / "transformer"
    for command in (["inspect"], ["quantize", tmp_path / "out", "--method", "mxfp4"], ["convert", tmp_path / "out"]):
        code, out, err = mxdit_command(monkeypatch, capsys, command[0], directory, *command[1:])
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ") and said in err, err


def test_a_shard_of_the_rest_that_is_missing_is_not_passed_over(monkeypatch, capsys, pipeline, tmp_path):
    source = shutil.copytree(pipeline, tmp_path / "wan")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (source / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    code, _, err = mxdit_command(monkeypatch, capsys, "quantize", source, tmp_path / "out", "--method", "mxfp4")
    assert code == 2 and err.count("\n") == 1 and "text_encoder/model-00001-of-00002.safetensors: a file that" in err
