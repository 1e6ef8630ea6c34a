"""Check the plugin's sources against those of one version of vLLM."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from vllm_versions.interface import CALLS, CONSTANTS, FIELDS, MODELS, PLUGIN
from vllm_versions.replacements import attention, is_name, models, split, stand_ins, tower
from vllm_versions.signatures import Signature, call_shape
from vllm_versions.sources import Definition, Function, Sources, attributes, find_method, methods
from vllm_versions.typed import Typed

ROOT = Path(__file__).parents[2]


@dataclass
class Findings:
    """What differs in a version."""

    problems: list[str] = field(default_factory=list)
    """What the plugin uses and this version lacks or has otherwise."""
    absent: list[str] = field(default_factory=list)
    """What the plugin can do without: overrides of methods that this version has not, and optional imports."""


def check(vllm: Path, plugin: Path = ROOT / "qwenvit" / "integrations" / "vllm") -> Findings:
    """Check the plugin against the folder of vLLM's package."""
    sources = Sources({PLUGIN: plugin, "vllm": vllm})
    findings = Findings()
    for each in (_imports, _overrides, _self_uses, _uses, _architectures, tower, attention, stand_ins, _listed):
        for problem in each(sources):
            kept = findings.absent if problem.startswith("absent") else findings.problems
            if problem not in kept:
                kept.append(problem)
    return findings


def _imports(sources: Sources) -> Iterator[str]:
    """Every name that the plugin imports from vLLM is there."""
    for module in sources.modules(PLUGIN):
        for source, name, _, optional in module.imports():
            if f"{source}.".startswith("vllm."):
                there = sources.module(source) if name is None else sources.find(source, name)
                if there is None:
                    yield f"{'absent, optional' if optional else 'no'} {source}{f':{name}' if name else ''}"


def _classes(sources: Sources, package: str) -> Iterator[Definition]:
    for module in sources.modules(package):
        for node in module.names.values():
            if isinstance(node, ast.ClassDef):
                yield Definition(module, node)


def _overrides(sources: Sources) -> Iterator[str]:
    """Our methods take what vLLM passes to those that they override, and pass on what these take."""
    for definition in _classes(sources, PLUGIN):
        ours, theirs = split(sources, definition)
        if not theirs:
            continue
        base = theirs[0].name
        for index, own in enumerate(ours):
            for name, method in methods(own).items():
                overridden = find_method(theirs, name)
                if overridden is not None and not _is_property(method):
                    why = Signature.of(method, bound=True).why_not_for(Signature.of(overridden[1], bound=True))
                    if why:
                        yield f"{own.name}.{name} {why}, unlike {overridden[0].name}.{name}"
                for call in _super_calls(method):
                    called = find_method([*ours[index + 1 :], *theirs], call.func.attr)  # type: ignore[attr-defined]
                    if called is not None:
                        count, keywords, more = call_shape(call)
                        if why := Signature.of(called[1], bound=True).why_not(count, keywords, more=more):
                            yield f"{called[0].name}.{called[1].name} {why}"
                    elif call.func.attr == name:  # type: ignore[attr-defined]
                        yield f"absent: {base}.{name}"
                    else:
                        yield f"no {base}.{call.func.attr}"  # type: ignore[attr-defined]


def _self_uses(sources: Sources) -> Iterator[str]:
    """Every attribute of `self` in a class that extends one of vLLM's is there."""
    for definition in _classes(sources, PLUGIN):
        ours, theirs = split(sources, definition)
        if not theirs:
            continue
        has = {*dir(nn.Module())}.union(*(attributes(each) for each in [*ours, *theirs]))
        for own in ours:
            for method in methods(own).values():
                names = {"self"} | _aliases(method)
                for node in ast.walk(method):
                    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in names and node.attr not in has:
                        yield f"no {theirs[0].name}.{node.attr}"


def _aliases(method: Function) -> set[str]:
    """Return the names that a method gives to `self`."""
    assignments = [node for node in ast.walk(method) if isinstance(node, ast.AnnAssign) and node.value is not None]
    return {ast.unparse(node.target) for node in assignments if is_name(node.value, "self")}


def _is_property(method: Function) -> bool:
    return any(
        isinstance(each, ast.Name) and each.id in ("property", "cached_property") for each in method.decorator_list
    )


def _super_calls(method: Function) -> Iterator[ast.Call]:
    for node in ast.walk(method):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super":
                yield node


def _uses(sources: Sources) -> Iterator[str]:
    """Every attribute of an object of vLLM's is there, and every call of a function of vLLM's fits."""
    for module in sources.modules(PLUGIN):
        yield from Typed(sources, module).problems()


def _architectures(sources: Sources) -> Iterator[str]:
    """vLLM has each architecture, in the class that ours extends."""
    registry = sources.module(f"{MODELS}.registry")
    assert registry is not None
    registered = {
        key.value: value
        for node in ast.walk(registry.tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2
    }
    for architecture, (ours, theirs) in models(sources).items():
        if architecture not in registered:
            yield f"no architecture {architecture}"
            continue
        module, name = ast.literal_eval(registered[architecture])
        expected = sources.find(module if "." in module else f"{MODELS}.{module}", name)
        if expected != theirs:
            yield f"{architecture} is {module}:{name}, not what {ours.module.name}:{ours.name} extends"


def find_function(sources: Sources, where: str) -> Function | None:
    """Return the function `module:name` or `module:Class.name`."""
    module, _, name = where.partition(":")
    owner, _, method = name.partition(".")
    found = sources.find(module, owner)
    if not isinstance(found, Definition):
        return None
    if method:
        inherited = find_method(sources.ancestors(found), method)
        return None if inherited is None else inherited[1]
    return found.node if isinstance(found.node, Function) else None


def _listed(sources: Sources) -> Iterator[str]:
    """What `interface` lists is as it says."""
    for where, called in CALLS:
        function = find_function(sources, where)
        if function is None:
            yield f"no {where}"
        elif called not in _called(function):
            yield f"{where} does not call {called}"
    for where, value in CONSTANTS:
        found = sources.find(*where.split(":"))
        assigned = getattr(found.node, "value", None) if isinstance(found, Definition) else None
        if not isinstance(assigned, ast.Constant) or assigned.value != value:
            yield f"{where} is not {value!r}"
    for where, name in FIELDS:
        found = sources.find(*where.split(":"))
        if not isinstance(found, Definition) or name not in attributes(found):
            yield f"no {where}.{name}"


def _called(function: Function) -> set[str]:
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            names.add(getattr(node.func, "attr", getattr(node.func, "id", "")))
            if is_name(node.func, "getattr") and isinstance(node.args[1], ast.Constant):
                names.add(node.args[1].value)
    return names
