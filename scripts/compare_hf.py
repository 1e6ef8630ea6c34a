"""Run transformers' vision tower and qwenvit's on the same inputs, show how far apart they are, and judge.

The rule (qwenvit/parity.py): on a CPU the reference tower equals the pinned transformers to the last bit. Elsewhere,
and for other versions: relative L2 <= 1e-5 in fp32, and in 16 bits no block, fed the fp32 truth's own input, is
further from that truth than 1.05 times transformers' own; nor is the output, where transformers' own error is small
enough (5 %) to mean anything. Exit code 0 says PASS, 1 FAIL, 2 that nothing was compared.

    python scripts/compare_hf.py --random qwen2_5_vl-7b --dtype bfloat16
    python scripts/compare_hf.py --model Qwen/Qwen3-VL-8B-Instruct --images photo.jpg --device cuda
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import qwenvit
from common.hf_towers import build_tower, forward, load_weights, save_tower
from compare.inputs import KINDS, load_inputs, synthetic
from compare.report import show_differences, verdict
from compare.runs import DisagreementError, check_ends, run_ours, run_theirs
from qwenvit import parity
from qwenvit.config.published import PUBLISHED, published_config
from qwenvit.parity import Check
from qwenvit.towers.checkpoint import locate, read_config

PINNED = "5.23."  # the transformers whose towers the reference tower equals to the last bit on a CPU

Pair = tuple[qwenvit.Encoder, nn.Module]


def main() -> int:
    arguments = parse_arguments()
    try:
        return compare(arguments)
    except DisagreementError as error:
        print(f"FAIL: {error}")
        return 1
    except (ImportError, OSError, TypeError, ValueError) as error:
        hint = "; pip install '.[compare]' brings transformers" if isinstance(error, ImportError) else ""
        print(f"compare_hf.py: error: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 2


def compare(arguments: argparse.Namespace) -> int:
    import transformers

    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        if arguments.random:
            config = published_config(arguments.random)
            # in the dtype that published ones are stored in
            tower = build_tower(config, dtype=torch.bfloat16, device=device, outliers=not arguments.no_outliers)
            source = save_tower(tower, config, Path(folder))
        else:
            source = locate(arguments.model)
        ours, theirs = load_both(source, arguments.impl, device, dtype)
        exact_rule = device.type == "cpu" and transformers.__version__.startswith(PINNED) and arguments.impl != "triton"
        truths = None if exact_rule else load_both(source, arguments.impl, device, torch.float32)
    print(f"transformers {transformers.__version__}, qwenvit {qwenvit.__version__}, torch {torch.__version__}")
    checks = []
    for kind in arguments.input:
        pixel_values, grid, names = load_inputs(ours, arguments.images, kind, arguments.max_pixels)
        patches = f"{len(pixel_values)} patches of {', '.join(names)}"
        print(f"\n{arguments.random or arguments.model}: {ours}, {patches}")
        inputs = pixel_values.to(device), grid
        checks += compare_on(inputs, names, (ours, theirs), truths)
    if arguments.rounds:
        show_times(ours, theirs, arguments.rounds)
    return verdict(checks)


def compare_on(inputs: tuple[Tensor, Tensor], names: list[str], towers: Pair, truths: Pair | None) -> list[Check]:
    """Show how far apart two towers are on the same inputs; the rule's checks. `truths` are the same in fp32."""
    ours, theirs = towers
    our_outputs, our_calls = run_ours(ours, *inputs)
    their_outputs, their_calls = run_theirs(theirs, *inputs)
    pairs = [(f"block {i}", a.out, b.out) for i, (a, b) in enumerate(zip(our_calls, their_calls, strict=True))]
    pairs += [(name, a, b) for (name, a), (_, b) in zip(our_outputs, their_outputs, strict=True)]
    show_differences(pairs, len(our_outputs), inputs[1], ours.config.merge_unit, names)
    if truths is None:
        return [parity.exact(*pair) for pair in pairs]
    our_truths, _ = run_ours(truths[0], *inputs)
    true_outputs, true_calls = run_theirs(truths[1], *inputs)
    checks = [parity.close(name, a, b) for (name, a), (_, b) in zip(our_truths, true_outputs, strict=True)]
    if ours.dtype != torch.float32:
        checks += parity.blocks_no_worse((ours.tower.blocks, our_calls), (theirs.blocks, their_calls), true_calls)
        checks += check_ends(our_outputs, their_outputs, true_outputs)
    return checks


def load_both(source: Path, impl: str, device: torch.device, dtype: torch.dtype) -> Pair:
    """The same weights in both towers, read by code that has nothing in common."""
    ours = qwenvit.Encoder.from_pretrained(source, device=device, dtype=dtype, impl=impl)
    theirs = build_tower(read_config(source), dtype=dtype, device=device)
    load_weights(theirs, source)
    return ours, theirs


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="directory or Hub repository of a checkpoint")
    source.add_argument("--random", choices=PUBLISHED, metavar="NAME", help=f"seeded weights: {', '.join(PUBLISHED)}")
    parser.add_argument("--no-outliers", action="store_true", help="seeded weights without channels 100 times larger")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--images", nargs="+", type=Path, default=[], help="files; default: synthetic pictures")
    kinds = "; ".join(f"{kind}: {text}" for kind, text in KINDS.items())
    pictures.add_argument("--input", nargs="+", choices=KINDS, default=["batch"], help=f"which synthetic ones; {kinds}")
    parser.add_argument("--max-pixels", type=int, help="shrink images to this area")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--impl", choices=("auto", "triton", "reference"), default="auto")
    parser.add_argument("--rounds", type=int, choices=range(1000), metavar="N", default=3, help="timed runs; 0: none")
    return parser.parse_args()


def show_times(encoder: qwenvit.Encoder, tower: nn.Module, rounds: int) -> None:
    pixel_values, grid = encoder.image_processor(synthetic(448, 448), min_pixels=448**2, max_pixels=448**2)
    inputs = (pixel_values.to(encoder.device), grid)
    runs = (lambda: encoder(*inputs).pooler_output, lambda: forward(tower, *inputs)[1])
    times: dict[int, list[float]] = {0: [], 1: []}
    for round_number in range(rounds + 1):  # interleaved; the first round warms up
        for which, run in enumerate(runs):
            start = time.perf_counter()
            with torch.no_grad():
                run().sum().item()  # waits for the device
            if round_number:
                times[which].append(time.perf_counter() - start)
    ours, theirs = map(statistics.median, times.values())
    print(
        f"\none 448x448 image, {len(pixel_values)} patches, {torch.get_num_threads()} threads, median of {rounds}: "
        f"qwenvit {ours * 1e3:.1f} ms, transformers (sdpa) {theirs * 1e3:.1f} ms, ratio {theirs / ours:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
