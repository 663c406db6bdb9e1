"""The rooms: imports point one way, no circle, no file or function that a reader cannot hold."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What a place may import: itself where it is a room, and everything before it.
ORDER = (("base",), ("losses", "models", "edm_networks", "presets", "text_to_image", "fid"),
         ("weights",), ("images",), ("metrics",), ("training",), ("train", "sample", "evaluate"),
         ("experiments",))
PLACE = {name: number for number, names in enumerate(ORDER) for name in names}
FILES = [path for path in sorted(ROOT.rglob("*.py"))
         if path.relative_to(ROOT).parts[0].removesuffix(".py") in PLACE]


def imports(path):
    """Modules of ours that a file imports wherever it does, but not where it runs as a command."""
    tree = ast.parse(path.read_text())
    commands = [node for node in tree.body if isinstance(node, ast.If)
                or isinstance(node, ast.FunctionDef) and node.name == "main"]
    command = {id(node) for one in commands for node in ast.walk(one)}
    for node in ast.walk(tree):
        if id(node) in command:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(name):
    """The file's own module name of an imported name: base.files.ROOT -> base.files."""
    parts = name.split(".")[:2]
    return ".".join(parts) if (ROOT / Path(*parts)).with_suffix(".py").is_file() else parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports(path):
        there = name.split(".")[0]
        if there in PLACE:
            assert PLACE[there] <= PLACE[here], f"{path} imports {name}"


def test_no_imports_go_in_a_circle():
    arrows = {".".join(path.relative_to(ROOT).with_suffix("").parts):
              {module_of(name) for name in imports(path) if name.split(".")[0] in PLACE}
              for path in FILES}
    left = dict(arrows)
    while free := [name for name, needs in left.items() if not (needs & left.keys()) - {name}]:
        for name in free:
            del left[name]
    assert not left


def test_the_losses_need_nothing_but_torch():
    assert {name.split(".")[0] for name in imports(ROOT / "losses.py")} == {"torch"}


def test_nothing_but_the_mathematics_and_the_commands_lies_at_the_root():
    assert {path.stem for path in ROOT.glob("*.py")} <= {
        "train", "sample", "evaluate", "losses", "models", "edm_networks", "fid", "presets",
        "text_to_image"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_and_each_function_fit_in_the_head(path):
    text = path.read_text()
    assert len(text.splitlines()) <= (400 if path.name == "edm_networks.py" else 350)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = 110 if node.name in ("iteration", "distill") else 60
            assert node.end_lineno - node.lineno < limit, node.name
