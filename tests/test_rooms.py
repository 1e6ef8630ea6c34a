"""Imports run one way: every module of the package and of scripts/ imports only from rooms that its room may import."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each room of the package may import from the package (CONTRIBUTING.md has the same table in words).
BASE = {"arguments", "config"}
BELOW_THE_TOP = {"plan", "ops", "preprocess", "towers", "graphs", "mrope", "weights", "outputs", "features"}
ALLOWED = {
    "arguments": set(),
    "busy_clock": set(),
    "pooling": set(),
    "outputs": {"config", "exports", "pooling"},
    "exports": {"config", "outputs", "weights"},
    "parity": set(),
    "config": {"arguments"},
    "plan": BASE,
    "ops": BASE | {"plan", "kernels"},
    "preprocess": BASE | {"plan", "ops", "weights"},
    "towers": BASE | {"plan", "ops", "outputs", "weights"},
    "graphs": BASE | {"plan", "ops", "outputs", "towers"},
    "features": BASE
    | {"plan", "ops", "preprocess", "towers", "graphs", "outputs", "pooling", "pipeline", "input_stream", "busy_clock"}
    | {"encoder"},
    "mrope": BASE | {"ops"},
    "pipeline": BASE | {"plan", "preprocess", "busy_clock"},
    "video_input": {"preprocess", "outputs"},
    "input_stream": {"preprocess", "outputs", "pipeline", "video_input"},
    "embedding_file": {"config", "outputs", "weights"},
    "encoder": BASE | BELOW_THE_TOP | {"pipeline", "busy_clock", "input_stream"},
    "item_stream": BASE | {"encoder", "pipeline", "preprocess", "outputs", "busy_clock"},
    "default_encoder": BASE | BELOW_THE_TOP | {"encoder", "pipeline"},
    "packing": {"ops"},
    "program": BASE | BELOW_THE_TOP | {"encoder"},
    "registry": {"config"},
    "integrations": BASE
    | BELOW_THE_TOP
    | {"encoder", "default_encoder", "datasets", "busy_clock", "pooling", "__version__"},
    "datasets": BASE | BELOW_THE_TOP | {"encoder", "item_stream", "busy_clock", "pooling", "pipeline", "__version__"},
    "cli": BASE | BELOW_THE_TOP | {"encoder", "default_encoder", "datasets", "item_stream", "__version__"},
    "__main__": {"cli"},
    "__init__": BASE
    | BELOW_THE_TOP
    | {"encoder", "default_encoder", "embedding_file", "packing", "program", "registry", "datasets"},
    "kernels": set(),
    "weights": set(),
}
SCRIPTS = {
    "commands": {"compare", "e2e", "encode_bench", "generate_bench", "kernel_bench", "peers", "vllm_bench", "common"},
    "vllm_bench": {"generate_bench", "e2e", "common"},
    "generate_bench": {"e2e", "peers", "common"},
    "e2e": {"compare", "peers", "common"},
    "compare": {"common"},
    "encode_bench": {"peers", "common"},
    "kernel_bench": {"peers", "common"},
    "peers": {"common"},
    "common": set(),
    "examples": set(),
}
FOREIGN = {
    "kernels": {"torch", "triton"},
    "weights": {"torch", "safetensors", "huggingface_hub", "requests", "httpx"},
}
"""Packages that a room may import besides the standard library and numpy. Rooms not named here may import any."""


def package_files() -> list[tuple[str, str]]:
    """Return every module of the package, with its room."""
    files = [(file.relative_to(ROOT / "qwenvit").parts[0], file) for file in (ROOT / "qwenvit").rglob("*.py")]
    files += [(folder, file) for folder in ("kernels", "weights") for file in (ROOT / folder).rglob("*.py")]
    return sorted((room.removesuffix(".py"), str(file.relative_to(ROOT))) for room, file in files)


def imports_of(tree: ast.AST) -> list[str]:
    """Return the dotted names that code imports: `a.b` for `from a import b`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def imports_at_start(file: str) -> list[str]:
    """Return the dotted names that importing a module imports, without imports in functions and for type checkers."""
    body = ast.parse((ROOT / file).read_text()).body
    return [
        name
        for node in body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for name in imports_of(node)
    ]


def forbidden(room: str, names: list[str]) -> list[str]:
    """Return the imports from the package that a room may not make."""
    rooms = {name: name.split(".")[1] for name in names if name.startswith("qwenvit.")}
    return [name for name, target in rooms.items() if target != room and target not in ALLOWED[room]]


@pytest.mark.parametrize(("room", "file"), package_files())
def test_a_room_imports_only_what_it_may(room, file):
    names = imports_of(ast.parse((ROOT / file).read_text()))
    assert forbidden(room, names) == []
    if room in FOREIGN:
        packages = {name.split(".")[0] for name in names} - {"qwenvit", "numpy"} - sys.stdlib_module_names
        assert packages <= FOREIGN[room]
    if room == "ops":  # triton is slow to import, and absent on some systems
        assert [name for name in imports_at_start(file) if name.startswith("qwenvit.kernels")] == []


def test_a_forbidden_import_is_found():
    assert forbidden("plan", ["qwenvit.towers.fast.FastTower"]) == ["qwenvit.towers.fast.FastTower"]
    assert forbidden("kernels", imports_of(ast.parse("def f():\n    from qwenvit import ops"))) == ["qwenvit.ops"]
    assert forbidden("towers", ["qwenvit.plan.rope.apply_rope", "torch.nn"]) == []


def test_there_are_no_circular_imports():
    modules = {}
    for _, file in package_files():
        parts = Path(file).with_suffix("").parts
        parts = parts if parts[0] == "qwenvit" else ("qwenvit", *parts)
        modules[".".join(parts).removesuffix(".__init__")] = imports_at_start(file)
    edges = {
        name: {target if target in modules else target.rpartition(".")[0] for target in imports} & modules.keys()
        for name, imports in modules.items()
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circular import: {' -> '.join([*path, name])}"
        if name not in done:
            path.append(name)
            for target in edges[name] - {name}:
                visit(target)
            done.add(path.pop())

    for name in edges:
        visit(name)


def script_files() -> list[tuple[str, str]]:
    """Return every script, with its folder."""
    folder = ROOT / "scripts"
    files = [(file.relative_to(folder).parts, file) for file in folder.rglob("*.py")]
    return sorted((parts[0] if len(parts) > 1 else "commands", str(file.relative_to(ROOT))) for parts, file in files)


@pytest.mark.parametrize(("place", "file"), script_files())
def test_no_command_imports_another_and_imports_run_down(place, file):
    commands = {Path(other).stem for where, other in script_files() if where == "commands"}
    imported = {name.split(".")[0] for name in imports_of(ast.parse((ROOT / file).read_text()))}
    assert imported & commands == set()
    assert (imported & set(SCRIPTS)) - {place} <= SCRIPTS[place]
