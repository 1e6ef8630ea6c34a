"""Follow the types of vLLM's objects through the plugin's functions."""

import ast
from collections.abc import Iterator

from vllm_versions.interface import ROOTS
from vllm_versions.signatures import Signature, call_shape
from vllm_versions.sources import Definition, Function, Module, Sources, attributes, methods


class Typed:
    """The uses of vLLM's objects in one module of the plugin.

    A name has a type if `ROOTS` lists it, or if a function assigns to it something that has one: an attribute with an
    annotation, or the result of a method with one.
    """

    def __init__(self, sources: Sources, module: Module) -> None:
        self._sources, self._module = sources, module

    def problems(self) -> Iterator[str]:
        """Yield attributes that are not there, and calls that do not fit."""
        for node in ast.walk(self._module.tree):
            if isinstance(node, Function):
                types = self._locals(node)
                for inner in ast.walk(node):
                    yield from self._problems_of(inner, types)
        for statement in self._module.tree.body:
            if not isinstance(statement, Function):
                for inner in ast.walk(statement):
                    yield from self._problems_of(inner, {})

    def _problems_of(self, node: ast.AST, types: dict[str, Definition]) -> Iterator[str]:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            target = self._sources.resolve(self._module, node.value) if _is_dotted(node.value) else None
            theirs = isinstance(target, Module) and target.name.startswith("vllm")
            if theirs and self._sources.find(target.name, node.attr) is None:
                yield f"no {target.name}:{node.attr}"
            owner = self._type_of(node.value, types)
            if owner is not None and not self._has(owner, node.attr):
                yield f"no {owner.name}.{node.attr}"
        if isinstance(node, ast.Call):
            called = self._called(node, types)
            if called is not None:
                name, function, bound = called
                count, keywords, more = call_shape(node)
                if why := Signature.of(function, bound=bound).why_not(count, keywords, more=more):
                    yield f"{name} {why}"

    def _called(self, call: ast.Call, types: dict[str, Definition]) -> tuple[str, Function, bool] | None:
        """Return the function of vLLM's that is called, and whether its first parameter is bound."""
        target = self._sources.resolve(self._module, call.func) if _is_dotted(call.func) else None
        if isinstance(target, Definition) and target.module.name.startswith("vllm"):
            if isinstance(target.node, Function):
                return target.name, target.node, False
            return self._method(target, "__init__")
        if isinstance(call.func, ast.Attribute):
            owner = self._type_of(call.func.value, types)
            if owner is not None:
                return self._method(owner, call.func.attr)
        return None

    def _method(self, owner: Definition, name: str) -> tuple[str, Function, bool] | None:
        for each in self._sources.ancestors(owner):
            if name in (found := methods(each)):
                return f"{owner.name}.{name}", found[name], True
        return None

    def _locals(self, function: Function) -> dict[str, Definition]:
        types: dict[str, Definition] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    pairs = [(target, node.value)]
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        pairs = list(zip(target.elts, node.value.elts, strict=True))
                    for name, value in pairs:
                        if isinstance(name, ast.Name) and (found := self._type_of(value, types)) is not None:
                            types[name.id] = found
        return types

    def _type_of(self, node: ast.expr, types: dict[str, Definition]) -> Definition | None:
        """Return the class of vLLM's that an expression is an object of, as far as names and annotations say."""
        if isinstance(node, ast.Name):
            if node.id in types:
                return types[node.id]
            if node.id in ROOTS:
                return self._definition(self._sources.find(*ROOTS[node.id].split(":")))
            target = self._sources.find(self._module.name, node.id)
            theirs = isinstance(target, Definition) and target.module.name.startswith("vllm")
            if theirs and isinstance(target.node, ast.ClassDef):
                return target  # its class methods and constants
            if isinstance(target, Definition) and isinstance(target.node, ast.Assign | ast.AnnAssign):
                value = target.node.value  # an object that a module of vLLM makes
                if isinstance(value, ast.Call) and target.module.name.startswith("vllm"):
                    return self._definition(self._sources.resolve(target.module, value.func))
            return None
        if isinstance(node, ast.Attribute):
            owner = self._type_of(node.value, types)
            found = None if owner is None else self._annotated(owner, node.attr)
            if found is None and node.attr in ROOTS:
                return self._definition(self._sources.find(*ROOTS[node.attr].split(":")))
            return found
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = self._type_of(node.func.value, types)
            return None if owner is None else self._annotated(owner, node.func.attr)
        return None

    def _annotated(self, owner: Definition, name: str) -> Definition | None:
        """Return the class that an attribute's annotation, or that of a method's result, names first."""
        for each in self._sources.ancestors(owner):
            annotation = attributes(each).get(name)
            if annotation is None:
                continue
            if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
                annotation = ast.parse(annotation.value, mode="eval").body
            for node in ast.walk(annotation):
                if isinstance(node, ast.Name | ast.Attribute):
                    found = self._definition(self._sources.resolve(each.module, node))
                    if found is not None:
                        return found
        return None

    def _has(self, owner: Definition, name: str) -> bool:
        family = self._sources.ancestors(owner)
        return name.startswith("__") or any(name in attributes(each) for each in family)

    @staticmethod
    def _definition(found: object) -> Definition | None:
        return found if isinstance(found, Definition) and isinstance(found.node, ast.ClassDef) else None


def _is_dotted(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)
