"""What `compare_hf.py` prints."""

import itertools

from torch import Tensor

from qwenvit.parity import Check, Difference

Pairs = list[tuple[str, Tensor, Tensor]]


def show_differences(pairs: Pairs, outputs: int, grid: Tensor, merge_unit: int, names: list[str]) -> None:
    print(f"\n{'after':<24} {'max abs':>10} {'mean abs':>10} {'rel L2':>10} {'cosine':>12}")
    for pair in pairs[:-outputs]:
        show(*pair)
    sizes = (grid.prod(dim=1) // merge_unit).tolist()
    for output, a, b in pairs[-outputs:]:
        show(output, a, b)
        for name, part, other in zip(names, a.split(sizes), b.split(sizes), strict=True):
            show(f"  {name}", part, other)


def show(name: str, a: Tensor, b: Tensor) -> None:
    d = Difference.of(a, b)
    print(f"{name[:24]:<24} {d.max_abs:>10.3g} {d.mean_abs:>10.3g} {d.relative_l2:>10.3g} {d.cosine:>12.9f}")


def verdict(checks: list[Check]) -> int:
    for check in (failed := [check for check in checks if not check.passed]):
        print(f"FAIL {check.name} = {check.value:.3g}, bound {check.bound:.3g}")
    for kind, group in itertools.groupby(checks, key=lambda check: check.name.rpartition(": ")[2]):
        values, bound = zip(*((check.value, check.bound) for check in group), strict=True)
        print(f"{kind}: {len(values)} checks, worst {max(values):.3g}, bound {bound[0]:.3g}")
    print("FAIL" if failed or not checks else "PASS")
    return 1 if failed or not checks else 0
