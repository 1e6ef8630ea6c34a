"""Read Python packages from their sources, without importing them: names, classes, signatures and calls."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A class, a function or an assignment, and the module that it is in."""

    module: "Module"
    node: ast.stmt

    @property
    def name(self) -> str:
        return getattr(self.node, "name", "")


class Module:
    """A module's syntax tree.

    Args:
        sources: where other modules are looked up.
        name: the module's dotted name.
        path: its file.
    """

    def __init__(self, sources: "Sources", name: str, path: Path) -> None:
        self.sources, self.name, self.path = sources, name, path
        self.tree = ast.parse(path.read_text(), path.name)

    @cached_property
    def names(self) -> dict[str, ast.stmt]:
        """What the module's names are bound to, imports inside `if` and `try` included; the first binding of each."""
        found: dict[str, ast.stmt] = {}
        for statement in _at_module_level(self.tree.body):
            for name in _bound_names(statement):
                found.setdefault(name, statement)
        return found

    def imports(self) -> Iterator[tuple[str, str | None, str, bool]]:
        """Yield `(module, name or None, bound as, optional)` of every import, those inside functions included.

        An import is optional inside a `try` that catches ImportError.
        """
        optional = {
            id(inner)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Try) and any("ImportError" in ast.dump(handler) for handler in node.handlers)
            for statement in node.body
            for inner in ast.walk(statement)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    yield self.absolute(node), alias.name, alias.asname or alias.name, id(node) in optional
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name, None, alias.asname or alias.name.partition(".")[0], id(node) in optional

    def absolute(self, node: ast.ImportFrom) -> str:
        """Return the dotted name of the module that an import names."""
        if not node.level:
            return node.module or ""
        package = self.name.split(".")
        if self.path.name != "__init__.py":
            package = package[:-1]
        package = package[: len(package) - (node.level - 1)]
        return ".".join([*package, *filter(None, [node.module])])


class Sources:
    """Packages below some folders.

    Args:
        packages: the folder of each package by its name, which may have dots.
    """

    def __init__(self, packages: dict[str, Path]) -> None:
        self._packages = packages
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """Return a module by its dotted name; None if no such file is there."""
        if name not in self._modules:
            self._modules[name] = None
            for package, folder in self._packages.items():
                if f"{name}.".startswith(f"{package}."):
                    parts = [part for part in name[len(package) :].split(".") if part]
                    for path in (folder.joinpath(*parts, "__init__.py"), folder.joinpath(*parts).with_suffix(".py")):
                        if path.is_file():
                            self._modules[name] = Module(self, name, path)
                            break
        return self._modules[name]

    def modules(self, package: str) -> list[Module]:
        """Return every module of a package."""
        folder = self._packages[package]
        names = []
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            names.append(".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)]))
        return [module for name in names if (module := self.module(name)) is not None]

    def find(self, module: str, name: str) -> "Definition | Module | None":
        """Return what a module's name is, through re-exports; None if it has no such name."""
        source = self.module(module)
        if source is None:
            return None
        statement = source.names.get(name)
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return self.find(source.absolute(statement), alias.name)
        if isinstance(statement, ast.Import):
            alias = next(a for a in statement.names if (a.asname or a.name.partition(".")[0]) == name)
            return self.module(alias.name if alias.asname else name)
        if statement is not None:
            return Definition(source, statement)
        return self.module(f"{module}.{name}")

    def resolve(self, module: Module, expression: ast.expr) -> "Definition | Module | None":
        """Return what `name` or `module.name` of a module's code refers to; subscripts (generics) are passed over."""
        if isinstance(expression, ast.Subscript):
            return self.resolve(module, expression.value)
        if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
            return self.resolve(module, ast.parse(expression.value, mode="eval").body)
        if isinstance(expression, ast.Name):
            return self.find(module.name, expression.id)
        if isinstance(expression, ast.Attribute):
            owner = self.resolve(module, expression.value)
            return self.find(owner.name, expression.attr) if isinstance(owner, Module) else None
        return None

    def ancestors(self, definition: Definition) -> list[Definition]:
        """Return a class and those that it inherits from, as far as their sources are here, the nearest first."""
        return list(dict.fromkeys(self._linear(definition)))

    def _linear(self, definition: Definition) -> Iterator[Definition]:
        yield definition
        for base in getattr(definition.node, "bases", []):
            target = self.resolve(definition.module, base)
            if isinstance(target, Definition) and isinstance(target.node, ast.ClassDef):
                yield from self._linear(target)


def find_method(family: list[Definition], name: str) -> tuple[Definition, Function] | None:
    """Return the first definition of a method in a class and its ancestors."""
    for each in family:
        if name in (found := methods(each)):
            return each, found[name]
    return None


def methods(definition: Definition) -> dict[str, Function]:
    """Return the methods that a class itself defines; of overloads, the last."""
    body = getattr(definition.node, "body", [])
    return {node.name: node for node in _at_module_level(body) if isinstance(node, Function)}


def attributes(definition: Definition) -> dict[str, ast.expr | None]:
    """Return the attributes that a class itself defines, in its body or as `self.name`, and their annotations."""
    found: dict[str, ast.expr | None] = {}
    for node in ast.walk(definition.node):
        if isinstance(node, ast.AnnAssign | ast.Assign | ast.AugAssign):
            annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (inner for each in targets for inner in ast.walk(each)):
                stored = isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
                if stored and ast.unparse(target.value) == "self":
                    found[target.attr] = found.get(target.attr) or annotation
    for node in _at_module_level(getattr(definition.node, "body", [])):
        for name in _bound_names(node):
            found[name] = getattr(node, "annotation", None) or getattr(node, "returns", None)
    return found


def _at_module_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, and those inside `if`, `try` and `with`, but not those of functions and classes."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for field in ("body", "orelse", "finalbody"):
                yield from _at_module_level(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                yield from _at_module_level(handler.body)


def _bound_names(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.Import(names=names):
            return [alias.asname or alias.name.partition(".")[0] for alias in names]
        case ast.ImportFrom(names=names):
            return [alias.asname or alias.name for alias in names]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []
