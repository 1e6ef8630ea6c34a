"""Print the differences and the verdict of `compare_hf.py`."""

import itertools

from torch import Tensor

from qwenvit.parity import Check, Difference

NamedPair = tuple[str, Tensor, Tensor]
"""Name of a tensor, qwenvit's, transformers'."""


def show_differences(
    blocks: list[NamedPair], outputs: list[NamedPair], grid: Tensor, merge_unit: int, item_names: list[str]
) -> None:
    """Print the difference after each block, of each output, and of each item's part of an output."""
    print(f"\n{'after':<24} {'max abs':>10} {'mean abs':>10} {'rel L2':>10} {'cosine':>12}")
    for pair in blocks:
        show_difference(*pair)
    tokens_per_item = (grid.prod(dim=1) // merge_unit).tolist()
    for output, ours, theirs in outputs:
        show_difference(output, ours, theirs)
        items = zip(item_names, ours.split(tokens_per_item), theirs.split(tokens_per_item), strict=True)
        for name, our_item, their_item in items:
            show_difference(f"  {name}", our_item, their_item)


def show_difference(name: str, ours: Tensor, theirs: Tensor) -> None:
    d = Difference.of(ours, theirs)
    print(f"{name[:24]:<24} {d.max_abs:>10.3g} {d.mean_abs:>10.3g} {d.relative_l2:>10.3g} {d.cosine:>12.9f}")


def show_verdict(checks: list[Check]) -> int:
    """Print failed checks, the worst value of each kind of check, and PASS or FAIL; return the exit code.

    No checks at all is a FAIL.
    """
    for check in (failed := [check for check in checks if not check.passed]):
        print(f"FAIL {check.name} = {check.value:.3g}, bound {check.bound:.3g}")
    for kind, group in itertools.groupby(checks, key=lambda check: check.name.rpartition(": ")[2]):
        values, bounds = zip(*((check.value, check.bound) for check in group), strict=True)
        print(f"{kind}: {len(values)} checks, worst {max(values):.3g}, bound {bounds[0]:.3g}")
    print("FAIL" if failed or not checks else "PASS")
    return 1 if failed or not checks else 0
