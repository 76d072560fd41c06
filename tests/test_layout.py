"""The shape of the code base: what the README lists, what the wheel holds, and how large files and functions are."""

import ast
import collections
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from setuptools import find_packages

from tests.command_line import ROOT
from tests.conftest import require

_MOST_FILES, _MOST_LINES, _MOST_FUNCTION_LINES, _MOST_PARAMETERS = 12, 350, 60, 8
PUBLISHED = (("dynexit/dyce/search.py", "search_and_eval"),)  # signatures as DyCE published them; no limit is on them
SOURCES = sorted(path for folder in ("dynexit", "launch") for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with the name of its file."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name_of(path), node


def listed_in_readme() -> set[str]:
    """Folders and files of the README's tree, folders with a slash at the end."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Layout\n\n")[2]
    found, parents = set(), list[str]()
    for line in re.findall(r"^    ( *\S.*)$", text.partition("\n\n")[0], re.MULTILINE):
        depth, entry = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        if not entry.endswith("/"):
            found |= set(line.split())
            continue
        parents[depth:] = [entry]
        found.add("".join(parents))
    return found


def test_the_readme_lists_what_git_has() -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    require(listing.returncode == 0, "this folder is no git repository")
    expected = set()
    for path in map(PurePosixPath, listing.stdout.splitlines()):
        root = path.parts[0]
        expected.add(root if len(path.parts) == 1 else f"{root}/")
        if root in ("dynexit", "launch"):
            expected.add(f"{path.parent}/")
    assert listed_in_readme() == expected


def test_a_wheel_holds_every_folder_with_code() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = find_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    assert sorted(packages) == sorted({name_of(path.parent).replace("/", ".") for path in SOURCES})
    held = set()
    for package, patterns in settings["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        held |= {path for pattern in patterns for path in folder.glob(pattern)}
    others = {path for folder in ("dynexit", "launch") for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert held == {path for path in others if path.suffix != ".py" and "__pycache__" not in path.parts}


def test_folders_and_files_are_small() -> None:
    large = [(name_of(path), "") for path in SOURCES if len(path.read_text("utf-8").splitlines()) > _MOST_LINES]
    counts = collections.Counter(name_of(path.parent) for path in SOURCES if path.name != "__init__.py")
    large += [(folder, "") for folder, count in counts.items() if count > _MOST_FILES]
    assert large == []


def test_functions_are_short_and_take_few_parameters() -> None:
    large = set()
    for file, node in functions():
        arguments = node.args
        num_parameters = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
        if node.end_lineno is not None and node.end_lineno - node.lineno >= _MOST_FUNCTION_LINES:
            large.add((file, node.name))
        if num_parameters > _MOST_PARAMETERS and node.name != "__init__":
            large.add((file, node.name))
    assert large == set(PUBLISHED)


def test_class_names_are_unique() -> None:
    nodes = (node for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    counts = collections.Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    assert [name for name, count in counts.items() if count > 1] == []
