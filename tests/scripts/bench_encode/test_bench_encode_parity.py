"""`scripts/bench_encode.py`: results that differ from those of transformers or of the tower alone are not timed."""

from dataclasses import replace

import pytest
import torch

from common.steps import steps_of
from encode_bench import measure, model_run, parity, report, stages
from encode_bench.folders import FULL_HD
from qwenvit import Encoder
from support.small_encode_bench import LIMITS, SMALL


def bench_with(bench, **changes):
    """Return a bench whose encoder has another image processor, while transformers' processor stays."""
    other = object.__new__(measure.EncodeBench)
    processor = replace(bench.encoder.image_processor, **changes)
    other.encoder, other.hf_tower = Encoder(bench.encoder.tower, processor), bench.hf_tower
    other.processor = bench.processor
    return other


@pytest.mark.parametrize(
    "changes", [{"image_mean": (0.5, 0.5, 0.500001)}, {"resize": "pillow"}, {"min_pixels": 20_000}], ids=str
)
def test_a_wrong_processor_is_refused(bench, paths, changes):
    with pytest.raises(measure.ParityError, match=r"0000\.jpg: pixel values differ from transformers' on the CPU"):
        bench_with(bench, **changes).folder(SMALL, paths)


def test_pixel_values_of_the_gpu_that_differ_are_refused(bench, paths, monkeypatch):
    def preprocess(encoder, image):
        pixels, grid = stages.preprocess(encoder, image)
        pixels[3, 5] = torch.nextafter(pixels[3, 5], torch.tensor(9.0))
        return pixels, grid

    assert parity.pixel_failures(bench.encoder, bench.processor, paths[0]) == []
    monkeypatch.setattr(parity, "preprocess", preprocess)
    assert parity.pixel_failures(bench.encoder, bench.processor, paths[0]) == [
        "0000.jpg: pixel values on the cpu differ from those on the CPU"
    ]


def test_other_tokens_are_refused(bench, paths, monkeypatch):
    encode = Encoder.encode

    def encode_in_another_order(self, images, **options):
        return encode(self, list(images)[::-1] if isinstance(images, list) else images, **options)

    assert parity.token_failures(bench.encoder, paths) == []
    monkeypatch.setattr(Encoder, "encode", encode_in_another_order)
    with pytest.raises(measure.ParityError, match=r"0000\.jpg to 0002\.jpg: encode differs from the tower"):
        bench.folder(SMALL, paths)
    monkeypatch.setattr(Encoder, "encode_video", lambda self, _: encode(self, paths[0]))
    with pytest.raises(measure.ParityError, match="encode_video differs"):
        bench.video(paths[:1], frames=4)


def test_no_figure_without_parity(bench, paths, monkeypatch):
    monkeypatch.setattr(model_run, "FOLDERS", (SMALL,))
    result = model_run.empty_result("Qwen3-VL-8B")
    files = {SMALL.name: paths, FULL_HD: paths}
    wrong, saved = bench_with(bench, image_std=(0.5, 0.5, 0.6)), []
    model_run.run_steps(wrong, result, [SMALL.name, "preprocessing"], LIMITS, files, steps_of(result, saved.append))
    assert (result["rows"], result["preprocessing"]) == ([], None)
    assert [name for name, _ in result["failed"]] == ["small", "preprocessing"]
    assert len(saved) == 2
    text = report.block([result], for_readers=True)
    assert (
        "- Failed: small, preprocessing: ParityError: 0000.jpg: pixel values differ from transformers' on the CPU"
        in text
    )
    assert "×" not in text.replace("1920×1080", "").partition("Times are")[0]
