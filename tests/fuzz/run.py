"""Run the fuzzers: `make fuzz`, or `PYTHONPATH=tests:scripts python -m fuzz.run --seed 3 --count 1000 checkpoints`."""

import argparse

from fuzz.frame import fuzz, run_alone

FUZZERS = ("checkpoints", "images", "hub")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fuzzers", nargs="*", metavar="FUZZER", help=f"of {', '.join(FUZZERS)}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000, help="cases of each; the cases of 10 begin those of 1000")
    parser.add_argument("--case", type=int, help="run this case alone, in this process")
    options = parser.parse_args()
    failed = False
    for fuzzer in options.fuzzers or FUZZERS:
        if options.case is not None:
            run_alone(fuzzer, options.seed, options.count, options.case)
            continue
        report = fuzz(fuzzer, options.seed, options.count)
        print(report, flush=True)
        failed |= bool(report.failures)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
