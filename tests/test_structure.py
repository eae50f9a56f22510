"""The house: imports run one way, files stay short, and what is installed works from another folder."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.oracles import HERE

# rooms from the top to the bottom: a module may import from its own room and from those below it
ROOMS = (
    ("tests", "test_hessian"),
    ("benchmark", "simple_example", "train_imagenet"),
    ("benchmarks", "imagenet"),
    ("curvature",),
    ("_curvature",),
    ("newton",),
    ("hessian",),
    ("_hessian",),
)
LARGEST = {"test": 900, "script": 900, "hessian": 800, "other": 600}  # lines of a file


def modules() -> dict[str, Path]:
    """Every module of the repository: its dotted name, and its file."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=HERE, capture_output=True, check=True, text=True)
    files = [HERE / line for line in listed.stdout.splitlines() if (HERE / line).exists()]
    names = {path: path.relative_to(HERE).with_suffix("").as_posix().replace("/", ".") for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The repository's modules that a module imports, anywhere in its text, for types too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module or "") if part)
            found = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        yield from (x for x in found if x in known and x != name)


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The modules that reach themselves by imports."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = edges[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    return sorted(name for name in edges if name in reached(name))


def test_imports_run_one_way():
    known = modules()
    edges = {name: set(imports(name, path, known)) for name, path in known.items()}
    assert circle(edges) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]
    floor = {room: index for index, rooms in enumerate(ROOMS) for room in rooms}
    upward = [
        f"{name} imports {other}"
        for name, others in edges.items()
        for other in others
        if floor[other.partition(".")[0]] < floor[name.partition(".")[0]]
    ]
    assert upward == []


def test_files_functions_and_classes_are_short():
    """A file is read in a sitting, a function on a screen."""
    long = []
    for name, path in modules().items():
        text, room = path.read_text(), name.partition(".")[0]
        kind = (
            "test"
            if room in ROOMS[0]
            else "script"
            if room in ROOMS[1]
            else "hessian"
            if name == "hessian"
            else "other"
        )
        if text.count("\n") > LARGEST[kind]:
            long.append(f"{name}: {text.count(chr(10))} lines, at most {LARGEST[kind]}")
        if kind == "test":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.end_lineno is not None:
                lines, most = node.end_lineno - node.lineno + 1, 60 if isinstance(node, ast.FunctionDef) else 300
                if lines > most:
                    long.append(f"{name}.{node.name}: {lines} lines, at most {most}")
    assert long == []
