"""What vLLM asks of the plugin's classes that take the place of its own."""

import ast
from collections.abc import Iterator
from typing import Any

from torch import nn

from vllm_versions.interface import (
    ATTENTION,
    ATTENTION_OF,
    GRAPH_METHODS,
    OF_OTHER_TOWERS,
    PLUGIN,
    STAND_INS,
    TOWER,
)
from vllm_versions.signatures import Signature, call_shape
from vllm_versions.sources import Definition, Function, Module, Sources, attributes, find_method, methods


def split(sources: Sources, definition: Definition) -> tuple[list[Definition], list[Definition]]:
    """Return the ancestors of one of the plugin's classes: the plugin's own, and vLLM's."""
    family = sources.ancestors(definition)
    ours = [each for each in family if each.module.name.startswith(PLUGIN)]
    return ours, [each for each in family if each not in ours]


def models(sources: Sources) -> dict[str, tuple[Definition, Definition | None]]:
    """Return our class of each architecture and the class of vLLM's that it extends."""
    found = {}
    module = sources.module(f"{PLUGIN}.architectures")
    assert module is not None
    for architecture, where in evaluate(module, "ARCHITECTURES").items():
        ours = sources.find(*where.split(":"))
        assert isinstance(ours, Definition), where
        found[architecture] = ours, next(iter(split(sources, ours)[1]), None)
    return found


def evaluate(module: Module, name: str) -> Any:
    """Return a constant of a module, whose expression may use constants before it."""
    constants: dict[str, Any] = {}
    for statement in module.tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            code = compile(ast.Expression(statement.value), module.name, "eval")
            constants[statement.targets[0].id] = eval(code, {}, constants)
        if name in constants:
            return constants[name]
    raise LookupError(f"name: expected a constant of {module.name}, got {name}")


def is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def tower(sources: Sources) -> Iterator[str]:
    """Our tower has all that vLLM's models use of `self.visual`, and takes their calls."""
    module, _, name = TOWER.partition(":")
    tower = sources.find(f"{PLUGIN}.{module}", name)
    assert isinstance(tower, Definition)
    has = {*attributes(tower), *dir(nn.Module())} | OF_OTHER_TOWERS
    forward = Signature.of(methods(tower)["forward"], bound=True)
    for _, theirs in models(sources).values():
        if theirs is None:
            continue
        for family in sources.ancestors(theirs):
            for method in methods(family).values():
                if method.name in GRAPH_METHODS:
                    continue
                for use in visual_uses(sources, family.module, method):
                    where = f"{family.name}.{method.name}"
                    if isinstance(use, str) and use not in has:
                        yield f"{where} uses self.visual.{use}, which {name} has not"
                    if isinstance(use, ast.Call):
                        count, keywords, more = call_shape(use)
                        if why := forward.why_not(count, keywords, more=more):
                            yield f"{where} calls self.visual, and {name}.forward {why}"


def visual_uses(
    sources: Sources, module: Module, function: Function, visual: str = "self.visual"
) -> Iterator[str | ast.Call]:
    """Yield the attributes that a function uses of a tower, and its calls; also in functions that it passes it to."""

    def is_visual(node: ast.expr) -> bool:
        return ast.unparse(node) == visual

    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and is_visual(node.value):
            yield node.attr
        if not isinstance(node, ast.Call):
            continue
        if is_visual(node.func):
            yield node
        if any(map(is_visual, node.args)):
            if is_name(node.func, "getattr") and isinstance(node.args[1], ast.Constant) and len(node.args) == 2:
                yield node.args[1].value
            target = sources.resolve(module, node.func)
            if isinstance(target, Definition) and isinstance(target.node, Function):
                index = next(i for i, argument in enumerate(node.args) if is_visual(argument))
                parameter = [*target.node.args.posonlyargs, *target.node.args.args][index].arg
                yield from visual_uses(sources, target.module, target.node, parameter)


def attention(sources: Sources) -> Iterator[str]:
    """vLLM's classes of attention are called as ours, and have what ours uses of them."""
    module, _, name = ATTENTION.partition(":")
    ours = sources.find(f"{PLUGIN}.{module}", name)
    assert isinstance(ours, Definition)
    needed = {each for each in attributes(ours) if not each.startswith("qwenvit_")} - {*methods(ours)}
    sometimes = set().union(*(alone for _, alone in ATTENTION_OF.values()))
    for kind, expected in evaluate(ours.module, "ARGUMENTS").items():
        where, alone = ATTENTION_OF[kind]
        theirs = sources.find(where, kind)
        if not isinstance(theirs, Definition):
            yield f"no {where}:{kind}"
            continue
        family = sources.ancestors(theirs)
        has = {*dir(nn.Module())}.union(*map(attributes, family))
        yield from (f"no {kind}.{each}" for each in sorted(needed - sometimes | alone) if each not in has)
        forward = find_method(family, "forward")
        got = () if forward is None else Signature.of(forward[1], bound=True).positional
        if got != tuple(expected):
            yield f"{kind}.forward takes {', '.join(got)}, not {', '.join(expected)}"


def stand_ins(sources: Sources) -> Iterator[str]:
    """Our classes that vLLM calls in place of its own have the methods of these."""
    for mine, original in STAND_INS.items():
        ours, theirs = sources.find(*f"{PLUGIN}.{mine}".split(":")), sources.find(*original.split(":"))
        assert isinstance(ours, Definition)
        if not isinstance(theirs, Definition):
            yield f"no {original}"
            continue
        for name, method in methods(theirs).items():
            own = find_method(sources.ancestors(ours), name)
            if own is None and not name.startswith("_"):
                yield f"{ours.name} has no {name}, unlike {theirs.name}"
            elif own is not None:
                why = Signature.of(own[1], bound=True).why_not_for(Signature.of(method, bound=True))
                if why:
                    yield f"{ours.name}.{name} {why}, unlike {theirs.name}.{name}"
