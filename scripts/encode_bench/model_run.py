"""Measure one model for `bench_encode.py`, step by step."""

import argparse
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

from common.hf_towers import build_tower, save_tower
from common.machine import Ceilings, describe_machine
from common.progress import progress
from common.steps import Step, raise_on, steps_of
from encode_bench.data_set import data_set
from encode_bench.folders import FOLDERS, FULL_HD, PHOTOS, Folder
from encode_bench.measure import EncodeBench
from encode_bench.parity import pixel_failures
from encode_bench.stages import DECODING_THREADS, preprocessing_figures
from encode_bench.verdicts import Result
from qwenvit import Encoder
from qwenvit.config.published import published_config

MODELS = {"Qwen2.5-VL-7B": "qwen2_5_vl-7b", "Qwen3-VL-8B": "qwen3_vl-8b"}
"""Names in `qwenvit.config.published`, by model."""
ONE, PREPROCESSING, VIDEO, MAPS, MEMORY = "one file", "preprocessing", "video", "features", "host memory"
DATA_SET = "data set"
CASES = (*(folder.name for folder in FOLDERS), ONE, PREPROCESSING, VIDEO, MAPS, DATA_SET, MEMORY)
"""The choices of `--cases`."""
FULL_HD_CASES, PHOTOS_CASES = (FULL_HD, ONE, PREPROCESSING, VIDEO), (PHOTOS, DATA_SET, MEMORY)
Files = Mapping[str, Sequence[Path]]
"""Paths by the name of their folder."""


def empty_result(model: str) -> Result:
    return {"model": model, "machine": "", "ceilings": "", "pictures": "", "threads": DECODING_THREADS, "rows": [],
            "one": None, "preprocessing": None, "video": None, "features": None, "data set": None, "memory": None,
            "failed": [], "seconds": {}}  # fmt: skip


def folders_for(cases: Collection[str]) -> list[Folder]:
    """Return the folders that the cases need."""
    needed = {FULL_HD: FULL_HD_CASES, PHOTOS: PHOTOS_CASES}
    return [folder for folder in FOLDERS if not set(cases).isdisjoint(needed.get(folder.name, (folder.name,)))]


def load_bench(model: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> EncodeBench:
    """Return a model's towers with seeded weights."""
    config = published_config(MODELS[model])
    hf_tower = build_tower(config, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder:
        encoder = Encoder.from_pretrained(save_tower(hf_tower, config, Path(folder)), device=device, dtype=dtype)
    return EncodeBench(encoder, hf_tower)


def run_model(
    model: str,
    options: argparse.Namespace,
    limits: Ceilings,
    files: Files,
    pictures: str,
    save: Callable[[Result], None],
) -> Result:
    """Measure everything about one model. A step that fails is listed under `failed`, and the next steps run.

    Args:
        model: a key of MODELS.
        options: the command's options.
        limits: the machine's ceilings.
        files: the JPEG files.
        pictures: what they were made of.
        save: called with all figures so far, after each step.
    """
    host, _, measured = describe_machine(limits, options.commit).partition("\n\n")
    result = empty_result(model) | {"machine": host, "ceilings": measured, "pictures": pictures}
    step, bench = steps_of(result, save), None
    with step("weights"):
        bench = load_bench(model)
    if bench is not None:
        run_steps(bench, result, options.cases, limits, files, step)
    progress("")
    return result


def run_steps(
    bench: EncodeBench, result: Result, cases: Collection[str], limits: Ceilings, files: Files, step: Step
) -> None:
    """Add the figures that `cases` asks for to the result."""
    for folder in FOLDERS:
        if folder.name in cases:
            with step(folder.name):
                result["rows"].append(bench.folder(folder, files[folder.name]))
    if ONE in cases:
        with step(ONE):
            result["one"] = bench.one_image(files[FULL_HD][0])
    if PREPROCESSING in cases:
        with step(PREPROCESSING):
            path = files[FULL_HD][0]
            raise_on(pixel_failures(bench.encoder, bench.processor, path))
            result["preprocessing"] = preprocessing_figures(bench.encoder, path, limits.copy_bandwidth)
    if VIDEO in cases:
        with step(VIDEO):
            result["video"] = bench.video(files[FULL_HD])
    if MAPS in cases:
        with step(MAPS):
            result["features"] = bench.features()
    if DATA_SET in cases:
        with step(DATA_SET):
            result[DATA_SET] = data_set(bench.fresh(), files[PHOTOS])
    if MEMORY in cases:
        with step(MEMORY):
            result["memory"] = bench.memory(files[PHOTOS])
