"""The scripts of `scripts/examples`, run with the demo tower on the bundled pictures, against what they should find."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvit.encoder import Encoder

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PICTURES = SCRIPTS / "pictures"

pytestmark = pytest.mark.filterwarnings("ignore:model='demo'")


def run(monkeypatch, name, *arguments):
    """Run a script, and return its variables."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(SCRIPTS / "examples" / name), run_name="__main__")


def test_feature_maps(monkeypatch, tmp_path, capsys):
    target = tmp_path / "maps.png"
    images = [PICTURES / "landscape.png", PICTURES / "shapes.png"]
    names = run(monkeypatch, "feature_maps.py", *images, "-o", target)
    assert [item.layers for item in names["features"]] == [(1, 2, 4)] * 2
    assert f"{images[0]} layers (1, 2, 4) maps [[26, 38, 128]" in capsys.readouterr().out
    row, column = names["row"], names["column"]
    assert names["similar"][0][row, column] == names["similar"][0].max() == pytest.approx(1)
    assert names["dense"].shape == (1, 128, 4 * 26, 4 * 38)
    with Image.open(target) as sheet:
        assert sheet.width > 5 * 38 * 8  # the picture, three layers, a similarity
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 500


def test_nearest_neighbours(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for name in ("landscape", "page", "panorama"):
        with Image.open(PICTURES / f"{name}.png") as image:
            image.convert("RGB").save(folder / f"{name}.png")
    with Image.open(PICTURES / "shapes.png") as image:
        image.convert("RGB").point(lambda level: level * 9 // 10).save(folder / "trip" / "darker.jpg")
        image.save(folder / "query.png")  # the query itself is no answer
    (folder / "broken.png").write_bytes(b"broken")
    arguments = [folder / "query.png", folder, "-k", 2, "-o", tmp_path / "n.png"]
    with pytest.warns(UserWarning, match="skipped .*broken"):
        names = run(monkeypatch, "nearest_neighbours.py", *arguments)
    first, second = capsys.readouterr().out.splitlines()[:2]
    files = [folder / "query.png", *(folder / f"{name}.png" for name in ("landscape", "page", "panorama"))]
    files.append(folder / "trip" / "darker.jpg")
    encoder = Encoder.from_pretrained("demo", device="cpu")  # the script takes a GPU, and bf16 there
    vectors = [encoder.encode(file, max_pixels=512 * 512)[0].tokens.double().mean(0).numpy() for file in files]
    query, *others = (vector / np.linalg.norm(vector) for vector in vectors)
    cosines = dict(zip(map(str, files[1:]), (float(query @ other) for other in others), strict=True))
    best = sorted(cosines, key=lambda file: -cosines[file])
    assert best[0] == str(files[-1])  # the same picture, darker
    for rank, line in enumerate((first, second), 1):
        place, name, cosine = line.split()
        assert (place, name) == (f"{rank}.", best[rank - 1])
        assert float(cosine) == pytest.approx(cosines[name], abs=3e-3)
    assert len(names["pictures"]) == 3


def test_compare_vectors(monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    run(monkeypatch, "compare_vectors.py", "--digits", 80, "--crops", 12, "--side", 64)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "demo: 80 digits, 12 crops, enlarged to 64²"
    rows = {name: [float(number.replace(",", "")) for number in numbers] for name, *numbers in cells(lines)}
    assert {name: width for name, (width, *_) in rows.items()} == {
        "pixels, shrunk to 8×8": 192,
        "patches of the last block, mean": 128,
        "patches of layer 2, mean": 128,
        "tokens, mean": 256,
        "tokens, one after another": 4 * 256,
        "DeepStack 0, mean": 256,
        "DeepStack 1, mean": 256,
        "DeepStack 2, mean": 256,
    }
    for name, (_, digits, crops) in rows.items():
        assert 0 <= crops <= 100, name
        assert digits > 25, name  # chance is 10


def cells(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]


def test_a_folder_without_neighbours_is_named(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="nowhere: no folder with other images"):
        run(monkeypatch, "nearest_neighbours.py", PICTURES / "shapes.png", tmp_path / "nowhere")
