"""Put one mistake after another into a copy of the code, and see that the tests notice each: `make mutants`.

A mutant is an expression of one function and what replaces it, so it stays valid while lines move. The tests that
should notice it run in the copy. A run that fails or never ends has noticed it. Exit status 1 if any mutant survives.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from huggingface_hub.utils import tqdm
from mutants.listed import MUTANTS
from mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
COPIED = (
    "qwenvit",
    "kernels",
    "weights",
    "scripts",
    "tests",
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "MANIFEST.in",
)
TIMEOUT_S = 300
"""Tests without a mutant take a tenth of it; longer means that the mutant made them hang."""


def function_lines(source: str, qualified_name: str) -> tuple[int, int]:
    """Return the first and the last line (exclusive, from 0) of a function, class or assignment in `source`.

    Raises:
        ValueError: there is not exactly one of that name.
    """
    nodes: list[ast.AST] = [ast.parse(source)]
    for name in qualified_name.split("."):
        inside = [child for node in nodes for child in ast.walk(node) if child is not node]
        nodes = [node for node in inside if getattr(node, "name", None) == name or _assigns(node, name)]
    if len(nodes) != 1:
        raise ValueError(f"{qualified_name}: expected one definition, got {len(nodes)}")
    node = nodes[0]
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
    return first - 1, node.end_lineno


def _assigns(node: ast.AST, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def mutated(source: str, mutant: Mutant) -> str:
    """Return the source with the mutant's change.

    Raises:
        ValueError: the function does not have the expression exactly once, or the result is not Python.
    """
    first, last = function_lines(source, mutant.function)
    lines = source.splitlines(keepends=True)
    body = "".join(lines[first:last])
    if body.count(mutant.before) != 1:
        raise ValueError(f"{mutant}: expected the expression once, got {body.count(mutant.before)}")
    text = "".join(lines[:first]) + body.replace(mutant.before, mutant.after) + "".join(lines[last:])
    compile(text, mutant.file, "exec")
    return text


def survives(mutant: Mutant, root: Path) -> bool:
    """Return whether the mutant's tests pass with it in the copy at `root`."""
    file = root / mutant.file
    source = file.read_text()
    file.write_text(mutated(source, mutant))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not long", *mutant.tests]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return False
    finally:
        file.write_text(source)
    if done.returncode not in (0, 1):  # pytest found no tests, or was called wrongly
        raise RuntimeError(f"{mutant}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def run(mutants: Sequence[Mutant], jobs: int) -> list[Mutant]:
    """Return the mutants that survive, run in `jobs` copies of the code at a time."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            root = Path(folder, str(number))
            for name in COPIED:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, root / name)
            copies.put(root)

        def try_one(mutant: Mutant) -> bool:
            root = copies.get()
            try:
                return survives(mutant, root)
            finally:
                copies.put(root)

        outcomes = list(tqdm(pool.map(try_one, mutants), total=len(mutants), unit="mutant", disable=None))
    return [mutant for mutant, survived in zip(mutants, outcomes, strict=True) if survived]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only mutants whose file, function or change contains this text")
    parser.add_argument("--sample", type=int, help="only so many of them, chosen by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="copies at a time")
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if options.only in str(mutant)]
    if options.sample is not None:
        mutants = random.Random(options.seed).sample(mutants, min(options.sample, len(mutants)))
    survivors = run(mutants, options.jobs)
    for mutant in survivors:
        print(f"survived: {mutant}")
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants noticed")
    return 1 if survivors or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())
