"""Whether calls fit functions, as `inspect.signature(...).bind` would say, from syntax trees."""

import ast
from dataclasses import dataclass

from vllm_versions.sources import Function


@dataclass(frozen=True)
class Signature:
    """A function's parameters without `self`, in order."""

    positional: tuple[str, ...]
    keyword: frozenset[str]
    required: frozenset[str]
    any_positional: bool
    any_keyword: bool

    @classmethod
    def of(cls, function: Function, *, bound: bool) -> "Signature":
        """Read a function's signature; `bound` leaves out the first parameter, unless it is a static method."""
        arguments = function.args
        positional = [*arguments.posonlyargs, *arguments.args]
        optional = len(arguments.defaults)
        required = {argument.arg for argument in positional[: len(positional) - optional]}
        keyword = [argument.arg for argument in arguments.kwonlyargs]
        required |= {name for name, default in zip(keyword, arguments.kw_defaults, strict=True) if default is None}
        names = [argument.arg for argument in positional]
        if bound and not any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list):
            required.discard(names[0])
            names = names[1:]
        return cls(
            tuple(names),
            frozenset(keyword),
            frozenset(required),
            arguments.vararg is not None,
            arguments.kwarg is not None,
        )

    def why_not(self, count: int, keywords: set[str], *, more: bool = False) -> str | None:
        """Return why a call of so many positional arguments and these keywords does not fit, or None.

        `more` says that the call may have others (`*args`, `**kwargs`), so that nothing is missing for certain.
        """
        if count > len(self.positional) and not self.any_positional:
            return f"takes {len(self.positional)} positional arguments ({', '.join(self.positional)}), not {count}"
        if not self.any_keyword and (unknown := keywords - self.keyword - {*self.positional[count:]}):
            return f"takes no argument named {', '.join(sorted(unknown))}"
        if not more and (missing := self.required - {*self.positional[:count]} - keywords):
            return f"requires {', '.join(sorted(missing))}"
        return None

    def why_not_for(self, theirs: "Signature") -> str | None:
        """Return why a function of this signature cannot take the place of one of `theirs`, or None."""
        if theirs.any_positional and not self.any_positional:
            return "takes no *args"
        if theirs.any_keyword and not self.any_keyword:
            return "takes no **kwargs"
        for index, name in enumerate(theirs.positional):
            if not self.any_positional and self.positional[index : index + 1] != (name,):
                return f"does not take {name} as positional argument {index + 1}"
        names = {*theirs.positional} | theirs.keyword
        if not self.any_keyword and (unknown := names - {*self.positional} - self.keyword):
            return f"takes no argument named {', '.join(sorted(unknown))}"
        if extra := self.required - theirs.required:
            return f"requires {', '.join(sorted(extra))}"
        return None


def call_shape(call: ast.Call) -> tuple[int, set[str], bool]:
    """Return a call's count of positional arguments, its keywords, and whether it may have others."""
    positional = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
    keywords = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    more = len(positional) < len(call.args) or any(keyword.arg is None for keyword in call.keywords)
    return len(positional), keywords, more
