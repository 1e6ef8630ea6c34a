"""Compare qwenvit's vision tower with transformers' on the same inputs: print the differences and a verdict.

The rule (qwenvit/parity.py): on a CPU the reference tower equals the pinned transformers to the last bit. Elsewhere,
and for other versions: relative L2 <= 1e-5 in fp32, and in 16 bits no block, fed the fp32 truth's own input, is
further from that truth than 1.05 times transformers' own block. The same holds for the outputs, where transformers' own
error is small enough (5 %) to mean anything. Exit code 0 says PASS, 1 FAIL, 2 that nothing was compared.

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

import qwenvit
from common.hf_towers import build_tower, forward, load_weights, save_tower
from compare.checks import TowerPair, compare_on_input
from compare.inputs import KINDS, load_inputs, synthetic_image
from compare.report import show_verdict
from compare.runs import DisagreementError
from qwenvit.config.published import PUBLISHED, published_config
from qwenvit.towers.checkpoint import read_config
from qwenvit.towers.locate import locate

PINNED = "5.23."  # the transformers whose towers the reference tower equals to the last bit on a CPU


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
    """Load the towers, compare them on every input, time them, and return the exit code."""
    import transformers

    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        if arguments.random:
            config = published_config(arguments.random)
            # bfloat16, as published checkpoints are stored
            tower = build_tower(config, dtype=torch.bfloat16, device=device, outliers=not arguments.no_outliers)
            source = save_tower(tower, config, Path(folder))
        else:
            source = locate(arguments.model)
        towers = load_both(source, arguments.impl, device, dtype)
        bit_exact = device.type == "cpu" and transformers.__version__.startswith(PINNED) and arguments.impl != "triton"
        fp32_towers = None if bit_exact else load_both(source, arguments.impl, device, torch.float32)
    print(f"transformers {transformers.__version__}, qwenvit {qwenvit.__version__}, torch {torch.__version__}")
    checks = []
    for kind in arguments.input:
        pixel_values, grid, names = load_inputs(towers.ours, arguments.images, kind, arguments.max_pixels)
        patches = f"{len(pixel_values)} patches of {', '.join(names)}"
        print(f"\n{arguments.random or arguments.model}: {towers.ours}, {patches}")
        checks += compare_on_input(pixel_values.to(device), grid, names, towers, fp32_towers)
    if arguments.rounds:
        show_times(towers, arguments.rounds)
    return show_verdict(checks)


def load_both(source: Path, impl: str, device: torch.device, dtype: torch.dtype) -> TowerPair:
    """Load the same checkpoint into both towers. The two readers share no code, so a wrong one shows."""
    ours = qwenvit.Encoder.from_pretrained(source, device=device, dtype=dtype, impl=impl)
    theirs = build_tower(read_config(source), dtype=dtype, device=device)
    load_weights(theirs, source)
    return TowerPair(ours, theirs)


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


def show_times(towers: TowerPair, rounds: int) -> None:
    """Print median times of both towers on one 448 x 448 image, in interleaved rounds."""
    encoder, tower = towers
    image = synthetic_image(448, 448)
    pixel_values, grid = encoder.image_processor(image, min_pixels=448**2, max_pixels=448**2)
    inputs = (pixel_values.to(encoder.device), grid)
    runs = (lambda: encoder(*inputs).pooler_output, lambda: forward(tower, *inputs)[1])
    times: dict[int, list[float]] = {0: [], 1: []}
    for round_number in range(rounds + 1):  # the first round warms up
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
