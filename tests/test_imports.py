"""Imports point one way, from what is asked for to what it is made of, and in no circle.

All of them count, those within functions and those for type checkers too.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTALLED = {
    "slimrt": "slimrt",
    "models": "slimrt.models",
    "convert": "slimrt.convert",
    "kernels_cu": "slimrt.kernels_cu",
}

# From the bottom to the top; what stands in one line does not import each other.
ORDER = (
    ("errors",),
    ("paths", "results", "config"),
    ("output", "weights", "documents", "row_blocks"),
    ("prune", "hub", "kernels_cu", "plans"),
    ("text",),
    ("ops", "sampling", "structured"),
    ("kv", "sampler", "parts"),
    ("models",),
    ("convert", "memory", "context"),
    ("attention",),
    ("layer_pass",),
    ("engine",),
    ("load_options", "reuse"),
    ("session", "inspect", "importance"),
    ("library",),
    ("request",),
    ("drafting",),
    ("session_file", "generation"),
    ("streaming",),
    ("tools",),
    ("conversation", "scoring", "embedding"),
    ("opening", "adapter_files", "ask_options"),
    ("llm",),
    ("loading", "llama_cpp", "eval"),
    ("server",),
    ("explain", "bench", "calibrate", "batch"),
    ("terminal",),
    ("click_cli",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def modules() -> dict[str, Path]:
    """Installed name -> source."""
    found = {"click_cli": ROOT / "click_cli.py"}
    for folder, name in INSTALLED.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [name, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(sources: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports. What ``slimrt`` itself hands out is its callers' business."""
    edges: dict[str, set[str]] = defaultdict(set)
    for module, path in sources.items():
        if module == "slimrt":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                while name and name not in sources:
                    name = name.rpartition(".")[0]
                if name not in ("", "slimrt", module):
                    edges[module].add(name)
    return edges


def room(module: str) -> str:
    """``slimrt.kv.cache`` -> kv."""
    return module if module == "click_cli" else module.split(".")[1]


def against(edges: dict[str, set[str]]) -> list[str]:
    """Imports of another room that is not below."""
    return sorted(
        f"{module} imports {other}"
        for module, others in edges.items()
        for other in others
        if room(module) != room(other) and RANK[room(other)] >= RANK[room(module)]
    )


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules of a circle, or none: what is left when those that import nothing that is left are taken away."""
    left = {module: set(others) for module, others in edges.items()}
    while done := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in done}
    return sorted(left)


def test_every_room_has_its_place() -> None:
    assert {room(module) for module in modules() if module != "slimrt"} == set(RANK)


def test_no_import_runs_against_the_direction() -> None:
    assert against(imports(modules())) == []


def test_no_circle() -> None:
    assert circle(imports(modules())) == []


def test_both_faults_are_found() -> None:
    edges = {"slimrt.ops.a": {"slimrt.kv.b"}, "slimrt.kv.b": {"slimrt.kv.c"}, "slimrt.kv.c": {"slimrt.kv.b"}}
    assert against(edges) == ["slimrt.ops.a imports slimrt.kv.b"]
    assert circle(edges) == ["slimrt.kv.b", "slimrt.kv.c", "slimrt.ops.a"]


def test_only_their_rooms_import_cupy_and_numba() -> None:
    allowed = {"cupy": "slimrt.ops.cuda", "numba": "slimrt.ops.fast", "llvmlite": "slimrt.ops.fast"}
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                place = allowed.get(name.split(".")[0])
                assert place is None or module.startswith(place), f"{module} imports {name}"
