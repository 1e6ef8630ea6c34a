"""`qwenvit picture`: which maps it draws, where, and what it refuses."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from qwenvit import cli
from qwenvit.encoder import Encoder
from qwenvit.features.pictures import pca_pictures, similarity_maps, similarity_pictures
from qwenvit.features.sheet import GAP, TEXT

BOUNDS = {"min_pixels": 256 * 256, "max_pixels": 256 * 320}
ARGUMENTS = ["-m", "demo", "--device", "cpu", "--min-pixels", str(256 * 256), "--max-pixels", str(256 * 320)]
HEADING = TEXT + GAP


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (256, 320, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "a.png")
    Image.radial_gradient("L").resize((256, 512)).save(folder / "trip" / "b.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def features(photos):
    encoder = Encoder.from_pretrained("demo", device="cpu")
    return encoder.features([photos / "a.png", photos / "trip" / "b.png"], (0, 2, -1), **BOUNDS)


def draw(capsys, tmp_path, *arguments):
    target = tmp_path / "deep" / "p.png"
    code = cli.main(["picture", *ARGUMENTS, "-o", str(target), *map(str, arguments)])
    captured = capsys.readouterr()
    drawn = np.asarray(Image.open(target)) if target.exists() else None
    return code, captured.out, captured.err, drawn


def cells(sheet, top, left, height, width, grid):
    """Return the colours of a map's cells, from the middle of each."""
    rows = top + (np.arange(grid[0]) * height + height // 2) // grid[0]
    columns = left + (np.arange(grid[1]) * width + width // 2) // grid[1]
    return sheet[rows][:, columns]


pytestmark = pytest.mark.filterwarnings("ignore:model='demo'")


def test_a_row_an_image_and_a_column_a_layer(capsys, photos, features, tmp_path):
    code, out, _, sheet = draw(capsys, tmp_path, photos, "--layers", "0,2,-1", "--side", "320")
    assert code == 0
    assert out.splitlines()[:2] == ["a.png: 16x20 patches", "trip/b.png: 24x12 patches"]
    assert out.splitlines()[2].startswith("2 of 2 images, layer 0 of 4; layer 2 of 4; layer 4 of 4 -> ")
    tops = (HEADING, HEADING + 256 + HEADING + GAP)
    sizes = ((256, 320), (320, 160))
    for number, (top, (height, width)) in enumerate(zip(tops, sizes, strict=True)):
        name = ("a.png", "trip/b.png")[number]
        photo = np.asarray(Image.open(photos / name).convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
        assert np.array_equal(sheet[top : top + height, :width], photo)
        for index in range(3):
            expected = pca_pictures([item.maps[index] for item in features], cell=1)[number]
            left = (index + 1) * (320 + GAP)
            drawn = cells(sheet, top, left, height, width, features[number].grid[1:])
            assert np.array_equal(drawn, np.asarray(expected)), (name, index)


def test_a_query_draws_cosines_and_marks_the_cell(capsys, photos, features, tmp_path):
    row, column = 5, 11
    maps = [item.maps[1] for item in features]
    cosines = similarity_maps(maps, maps[0][row, column])
    expected = similarity_pictures(cosines, cell=1)
    code, out, _, sheet = draw(capsys, tmp_path, photos, "--layers", "2", "--query", f"{row},{column}", "--side", 320)
    assert code == 0
    low, high = min(float(one.min()) for one in cosines), max(float(one.max()) for one in cosines)
    assert f"layer 2 of 4: cosine {low:.2f} (dark) to {high:.2f} (light)" in out
    drawn = cells(sheet, HEADING, 320 + GAP, 256, 320, (16, 20))
    assert np.array_equal(drawn, np.asarray(expected[0]))
    below = cells(sheet, HEADING + 256 + HEADING + GAP, 320 + GAP, 320, 160, features[1].grid[1:])
    assert np.array_equal(below, np.asarray(expected[1]))
    assert (sheet[HEADING + row * 16 - 1, column * 16 : column * 16 + 16] == 32).all()  # the outline on the image
    pixel = f"{column * 16 + 9},{row * 16 + 3}"
    *_, by_pixel = draw(capsys, tmp_path, photos, "--layers=2", "--query-pixel", pixel, "--side", 320)
    assert np.array_equal(by_pixel, sheet)


def test_one_map_alone_and_merged_cells_with_their_norm(capsys, photos, tmp_path):
    encoder = Encoder.from_pretrained("demo", device="cpu")
    (item,) = encoder.features(photos / "a.png", (3,), what="tokens", norm=True, **BOUNDS)
    more = ["--layers", "3", "--what", "tokens", "--norm", "--map-only", "--side", "320"]
    code, out, _, sheet = draw(capsys, tmp_path, photos / "a.png", *more)
    assert code == 0
    assert out.startswith("a.png: 8x10 tokens\n")
    assert sheet.shape == (256, 320, 3)
    assert np.array_equal(sheet, np.asarray(pca_pictures(item.maps, cell=32)[0]))


def test_what_is_broken_is_named_and_the_rest_is_drawn(capsys, photos, tmp_path):
    (photos / "0.png").write_bytes(b"broken")
    Image.new("RGB", (1, 4000)).save(photos / "thin.png")
    code, out, err, sheet = draw(capsys, tmp_path, photos, "--map-only")
    assert code == 1
    assert "qwenvit: error: 0.png: " in err
    assert "qwenvit: error: thin.png: " in err
    assert "2 of 4 images" in out
    assert sheet.shape[0] == 358 + GAP + 448
    code, _, err, _ = draw(capsys, tmp_path, photos, "--query", "0,0")
    assert code == 1
    assert "qwenvit: error: 0.png, which --query and --query-pixel need: " in err


def test_a_limit_is_said(capsys, photos, tmp_path):
    code, out, err, sheet = draw(capsys, tmp_path, photos, "--limit", "1", "--map-only")
    assert code == 0
    assert "only the first 1 of 2 images" in err
    assert "1 of 1 images" in out
    assert sheet.shape == (358, 448, 3)
    archive = tmp_path / "photos.tar"  # whose number of images is an estimate
    with tarfile.open(archive, "w") as opened:
        opened.add(photos, "photos")
    *_, err, _ = draw(capsys, tmp_path, archive, "--limit", "1")
    assert "only the first 1 images; --limit draws more" in err
    *_, err, _ = draw(capsys, tmp_path, archive, "--limit", "2")
    assert "only the first" not in err
    code, out, err, _ = draw(capsys, tmp_path, photos / "a.png", photos, "--limit", "1", "--map-only")
    assert code == 0
    assert "only the first 1 of 3 images" in err


def test_images_of_two_folders_may_have_the_same_name(capsys, photos, tmp_path):
    Image.new("RGB", (256, 256), "red").save(tmp_path / "a.png")
    code, out, _, sheet = draw(capsys, tmp_path, photos / "a.png", tmp_path / "a.png", "--map-only")
    assert code == 0
    assert out.startswith("a.png: 16x20 patches\na.png: 16x16 patches\n2 of 2 images")
    assert sheet.shape == (358 + GAP + 448, 448, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--query", "16,0"), "--query: expected a row of 0 to 15 and a column of 0 to 19, got 16,0 (a.png)"),
        (("--query", "0,-1"), "--query: expected a row of 0 to 15"),
        (("--query-pixel", "320,0"), "--query-pixel: expected x of 0 to 319 and y of 0 to 255, got 320,0"),
        (("--query-pixel", "0,-1"), "--query-pixel: expected x of 0 to 319"),
        (("--layers", "5"), "layers: "),
        (("--limit", "0"), "--limit, --side: expected at least 1"),
        (("--side", "0"), "--limit, --side: expected at least 1"),
        (("-o", "p.notes"), "--output: expected the name of a picture"),
        (("-o", "p.psd"), "--output: expected the name of a picture"),  # Pillow reads it, and cannot write it
    ],
)
def test_impossible_arguments(capsys, photos, tmp_path, arguments, message):
    code, _, err, sheet = draw(capsys, tmp_path, photos / "a.png", *arguments)
    assert code == 1
    assert f"qwenvit: error: {message}" in err
    assert sheet is None


@pytest.mark.parametrize("arguments", [("--layers", "a"), ("--query", "3"), ("--query", "1,2", "--query-pixel", "1,2")])
def test_wrong_usage(capsys, photos, tmp_path, arguments):
    with pytest.raises(SystemExit) as stop:
        draw(capsys, tmp_path, photos / "a.png", *arguments)
    assert stop.value.code == 2


def test_the_last_layer_is_the_encoders_own(capsys, photos, tmp_path):
    """Without --layers: the states after the last block, which encode returns too."""
    encoder = Encoder.from_pretrained("demo", device="cpu")
    states = encoder.encode(photos / "a.png", keep_patches=True, **BOUNDS).last_hidden_state
    blocks = states.unflatten(0, (8, 10, 2, 2)).transpose(1, 2).reshape(16, 20, -1)  # merge blocks of 2x2 patches
    *_, sheet = draw(capsys, tmp_path, photos / "a.png", "--map-only", "--side", "320")
    assert torch.equal(torch.from_numpy(sheet.copy()), torch.from_numpy(np.asarray(pca_pictures([blocks])[0]).copy()))
