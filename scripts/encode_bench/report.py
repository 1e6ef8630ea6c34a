"""Figures of `bench_encode.py` as markdown, for the terminal and for a page."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from common.pages import table
from common.steps import failures
from encode_bench.verdicts import (
    ENCODE,
    FEATURES,
    LAST_MAP,
    PIPELINE,
    RIVALS,
    TOKENS,
    TOWER,
    VECTORS,
    Result,
    Row,
    beyond_ms,
    cold_over_the_tower,
    growth_mb,
    over_the_pipeline,
    over_the_tower,
    verdicts,
)

PICTURE = "![from JPEG files to embeddings, ms an image](scripts/readme/encode.png)"
ENCODE_MARKERS = ("<!-- bench_encode.py: begin -->", "<!-- bench_encode.py: end -->")
"""Around all figures from files to embeddings, in BENCHMARKS.md."""
METHOD = (
    "Times are medians of wall time in ms an image, from JPEG files (quality 90, noise added) that the system has in "
    "its cache to embeddings that are ready on the GPU. encode: `encoder.encode(paths)` with its defaults. Cold: its "
    "first pass with an encoder that has no CUDA graphs yet, kernels compiled. Tower alone: `encoder(pixel_values, "
    "grid)` of the same images in batches of up to 32768 patches (of a video, whole frame groups), pixel values on the "
    "GPU in bf16. transformers: "
    "`Image.open(path)`, then `processor(images=[image], return_tensors='pt', device=…)` of its torchvision processor, "
    "then qwenvit's tower, or its own in eager mode with sdpa, one image after another, on a sample of the folder from "
    "its smallest to its largest image. Pixel values of the first image of each folder, on the GPU and on the CPU, are "
    "equal to transformers' on the CPU to the last bit, and `encode`'s tokens of the first three to the tower's for "
    "their pixel values; otherwise no figure is given."
)
JOB_METHOD = (
    "Data set: `encode_dataset(folder, output, model=encoder)` with an encoder that has run, from the first file to "
    "the last shard on the disk: loading the model, hashing its weights and compiling kernels are left out. Pipeline: "
    "`iter_encode` over the same files, results dropped. The disk's speed: files of 1 GiB, each synced while the next "
    "is written. Tokens of some rows are compared with `encode`'s to the last bit."
)
STAGES_METHOD = (
    "Stages are timed on their own, over a sample of each folder: decoding with Pillow in one thread, divided by the "
    "number of decoding threads; the copy from pinned memory and the preprocessing by CUDA events. They overlap with "
    "the tower, and do not add up to the time of `encode`: that is the tower's and what the tower waits. The chart's "
    "bars of transformers are its whole time, in which one image's decoding overlaps with the tower of the one before."
)


def milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 100 else f"{ms:.0f}"


def stages_ms(row: Row, threads: int) -> dict[str, float]:
    """Return the ms an image of each stage: of the three before the tower, of the tower, and of what it waits."""
    stages, tower = row["stages"], row["times"][TOWER]
    seconds = {"decode": stages["decode"] / threads, "copy": stages["copy"], "preprocessing": stages["preprocess"]}
    seconds |= {"tower": tower, "waiting": max(0.0, row["times"][ENCODE] - tower)}
    return {name: value * 1e3 for name, value in seconds.items()}


def folders_table(result: Result) -> str:
    """Return a row for each folder: `encode`, the tower alone, and transformers' processor in front of either tower."""
    head = ["", "images", "patches an image", "tower alone, ms", "encode, ms", "images/s", "over the tower", "cold"]
    lines = []
    for row in result["rows"]:
        times = row["times"]
        cells = [row["name"], str(row["images"]), f"{row['patches']:.0f}", milliseconds(times[TOWER])]
        cells += [f"**{milliseconds(times[ENCODE])}**", f"{1 / times[ENCODE]:.1f}", f"{over_the_tower(row):.2f}×"]
        cells += [f"{cold_over_the_tower(row):.2f}×"]
        cells += [f"{milliseconds(times[name])} ({times[name] / times[ENCODE]:.1f}×)" for name in RIVALS]
        lines.append(cells)
    return table([*head, *(f"{name}, ms" for name in RIVALS)], lines)


def stages_table(result: Result) -> str:
    """Return a row for each folder with the ms of its stages."""
    threads, lines = result["threads"], []
    for row in result["rows"]:
        stages = stages_ms(row, threads)
        cells = [row["name"], f"{milliseconds(row['stages']['decode'])} / {threads} = {stages['decode']:.2f}"]
        lines.append([*cells, *(f"{stages[name]:.3f}" for name in list(stages)[1:])])
    head = ["ms an image", f"decode / {threads} threads", "copy", "GPU preprocessing", "tower", "waiting"]
    return table(head, lines)


def one_text(one: Row) -> str:
    return (
        f"One 1920×1080 file alone: {milliseconds(one[ENCODE])} ms, of which decoding {milliseconds(one['decode'])} "
        f"and the tower {milliseconds(one[TOWER])}: {beyond_ms(one):.2f} ms beyond"
    )


def preprocessing_text(step: Row) -> str:
    return (
        f"Resizing, normalising and cutting 1920×1080 on the GPU: {step['seconds'] * 1e3:.3f} ms; moving its "
        f"{step['bytes'] / 1e6:.1f} MB takes {step['floor'] * 1e6:.1f} µs"
    )


def video_text(video: Row) -> str:
    return (
        f"{video['frames']} frames of 1920×1080 ({video['patches']} patches): `encode_video` {video[ENCODE] * 1e3:.0f} "
        f"ms, tower alone {video[TOWER] * 1e3:.0f} ms, {video[ENCODE] / video[TOWER]:.2f}×"
    )


def features_text(rows: Iterable[Row]) -> str:
    found = [
        f"{row['side']}² {milliseconds(row[FEATURES])} ms, {row[FEATURES] / row[LAST_MAP]:.2f}× the last layer's alone "
        f"(whole tower {milliseconds(row[TOWER])} ms)"
        for row in rows
        if LAST_MAP in row  # figures from before it was measured have none
    ]
    return f"Maps of four layers of one image from its pixel values: {'; '.join(found)}"


def data_set_text(job: Row) -> str:
    images, gigabytes = job["images"], job["bytes"] / 1e9
    rates = {name: f"{images / job[name]:.0f}" for name in (PIPELINE, VECTORS, TOKENS)}
    shares = {name: f"{1 / over_the_pipeline(job, name):.2f}" for name in (VECTORS, TOKENS)}
    slower = "the disk's" if job["disk"] > job[PIPELINE] else "the pipeline's"
    return (
        f"A data-set job over {images} files of 640×480: {rates[VECTORS]} images/s with vectors alone, "
        f"{shares[VECTORS]} of the pipeline's {rates[PIPELINE]}; {rates[TOKENS]} with tokens ({gigabytes:.1f} GB), "
        f"{shares[TOKENS]} of {slower} speed (the disk writes {gigabytes / job['disk']:.1f} GB/s)"
    )


def memory_text(memory: Row) -> str:
    return (
        f"Host memory over {memory['images']} images from a generator through `iter_encode`: "
        f"{memory['before'] / 1e6:.0f} MB after {memory['first']}, {growth_mb(memory):+.0f} MB at the most after that"
    )


def notes(result: Result, for_readers: bool) -> list[str]:
    """Return the lines below a model's table; bars unless `for_readers`."""
    bars = [] if for_readers else verdicts(result)
    found = [f"{sum(bar.met for bar in bars)} of {len(bars)} bars met: {'; '.join(map(str, bars))}"] if bars else []
    texts: dict[str, Callable[[Any], str]] = {"one": one_text, "preprocessing": preprocessing_text}
    texts |= {"video": video_text, "features": features_text, "data set": data_set_text, "memory": memory_text}
    found += [text(result[name]) for name, text in texts.items() if result.get(name)]
    found += [] if for_readers else [f"Seconds of the steps: {result['seconds']}"]
    return found + [f"Failed: {line}" for line in failures(result)]


def section(result: Result, for_readers: bool) -> str:
    """Return one model's table, its notes, and the table of stages."""
    parts = [f"### From files, {result['model']}"]
    parts += [folders_table(result)] if result["rows"] else []
    parts += ["\n".join(f"- {note}." for note in notes(result, for_readers))]
    return "\n\n".join([*parts, stages_table(result)] if result["rows"] else parts)


def block(results: Iterable[Result], for_readers: bool) -> str:
    """Return the sections of all models, under the machines they ran on; bars unless `for_readers`."""
    parts = []
    for host, group in itertools.groupby(results, key=lambda r: (r["machine"], r["ceilings"], r["pictures"])):
        machine, ceilings, pictures = host
        parts += [machine, f"{ceilings}. The files were made of {pictures}."]
        parts += [section(result, for_readers) for result in group]
    return "\n\n".join([*([PICTURE] if for_readers else []), *parts, METHOD, JOB_METHOD, STAGES_METHOD])
