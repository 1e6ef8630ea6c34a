"""The command line: what it prints, writes and returns, and how it fails."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

import qwenvit
from qwenvit import cli, default_encoder
from qwenvit.encoder import Encoder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    Image.linear_gradient("L").resize((320, 256)).convert("RGB").save(folder / "a.png")
    Image.radial_gradient("L").resize((256, 512)).save(folder / "trip" / "b.jpg")
    (folder / "notes.txt").write_text("not an image")
    return folder


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_encode_writes_what_the_library_returns(capsys, photos, tmp_path):
    target = tmp_path / "deep" / "out.safetensors"
    code, out, err = run(capsys, "encode", photos, "-m", "demo", "--device", "cpu", "-o", target)
    assert code == 0
    assert "warning: model='demo' has random weights" in err
    assert "2 of 2 images" in out
    expected = qwenvit.encode([photos / "a.png", photos / "trip" / "b.jpg"], model="demo", device="cpu")
    tensors = load_file(target)
    for name, item in zip(("a.png", "trip/b.jpg"), expected, strict=True):
        torch.testing.assert_close(tensors[f"{name}/tokens"], item.tokens, rtol=1e-4, atol=1e-4)
        assert f"{name}/deepstack.2" in tensors
        assert f"{item.grid[1]}x{item.grid[2]}" in out
    with safe_open(target, "pt") as file:
        grids = json.loads(file.metadata()["grids"])
    assert grids == {"a.png": list(expected[0].grid), "trip/b.jpg": list(expected[1].grid)}


@pytest.mark.parametrize(("bound", "most"), [(("--max-tokens", 20), 20), (("--max-pixels", 50_000), 48)])
def test_an_upper_bound_alone_may_be_below_the_lower_one(capsys, photos, tmp_path, bound, most):
    target = tmp_path / "out.safetensors"
    code, _, _ = run(capsys, "encode", photos, "-m", "demo", *bound, "-o", target)
    assert code == 0
    assert most / 2 < len(load_file(target)["a.png/tokens"]) <= most
    code, out, _ = run(capsys, "picture", photos / "a.png", "-m", "demo", *bound, "-o", tmp_path / "p.png")
    assert code == 0
    rows, columns = map(int, out.split()[1].split("x"))
    assert most / 2 < rows * columns / 4 <= most


def test_broken_files_are_named_and_the_rest_is_encoded(capsys, photos, tmp_path):
    (photos / "._a.png").write_bytes(b"metadata that macOS writes beside a.png")
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:300])
    target = tmp_path / "out.safetensors"
    code, out, err = run(capsys, "encode", photos, "-m", "demo", "-o", target)
    assert code == 1
    assert "2 of 3 images" in out
    errors = [line for line in err.splitlines() if line.startswith("qwenvit: error:")]
    assert len(errors) == 1
    assert "broken.png" in errors[0]
    assert {key.split("/tokens")[0] for key in load_file(target) if key.endswith("tokens")} == {"a.png", "trip/b.jpg"}


@pytest.mark.parametrize(
    "bounds",
    [
        ("--min-pixels", 5000, "--max-pixels", 4000),
        ("--min-pixels", 10**9),
        ("--min-pixels", -1),
        ("--max-pixels", 0),
        ("--max-tokens", 0),
        ("--max-tokens", 9, "--max-pixels", 5000),
    ],
    ids=str,
)
def test_impossible_bounds_are_told_once_and_not_for_every_file(capsys, photos, tmp_path, bounds):
    target = tmp_path / "out.safetensors"
    code, out, err = run(capsys, "encode", photos, "-m", "demo", *bounds, "-o", target)
    errors = [line for line in err.splitlines() if line.startswith("qwenvit: error:")]
    assert (code, len(errors), out) == (1, 1, "")
    assert str(photos) not in errors[0]
    assert bounds[0].strip("-").replace("-", "_") in errors[0]
    assert not target.exists()


def test_a_folders_images_are_found_whatever_the_case_of_their_suffix(capsys, photos, tmp_path):
    folder, png = tmp_path / "camera", (photos / "a.png").read_bytes()  # Pillow tells formats by their content
    folder.mkdir()
    suffixes = ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2"]
    suffixes += ["tga", "ppm", "pgm"]
    names = [f"{number}.{suffix}" for number, suffix in enumerate(suffixes)]
    names += [f"{number}.{suffix.upper()}" for number, suffix in enumerate(suffixes, start=100)]
    names += ["200.Jpg", "201.pNG"]
    for name in names:
        (folder / name).write_bytes(png)
    for other in ("JPG", "a.JPG.txt", "b.jpgx"):
        (folder / other).write_bytes(png)
    target = tmp_path / "out.safetensors"
    code, _, err = run(capsys, "encode", folder, "-m", "demo", "--max-tokens", 1, "-o", target)
    assert code == 0
    assert {key.split("/")[0] for key in load_file(target)} == set(names)
    assert "3 other files skipped" in err


@pytest.mark.filterwarnings("ignore:model='demo'")
def test_a_tilde_is_the_home_folder(capsys, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Encoder.from_pretrained("demo", device="cpu").save_pretrained("~/tower")
    assert (tmp_path / "tower").is_dir()
    for model in ("~/tower", "~/tower/model.safetensors"):
        code, out, _ = run(capsys, "info", model)
        assert code == 0
        assert "deepstack_visual_indexes" in out
        code, _, _ = run(capsys, "encode", photos / "a.png", "-m", model, "-o", tmp_path / "out.safetensors")
        assert code == 0
    loaded, load = [], Encoder.from_pretrained
    monkeypatch.setattr(default_encoder.Encoder, "from_pretrained", lambda *a, **k: loaded.append(a) or load(*a, **k))
    expected = qwenvit.encode(photos / "a.png", model=tmp_path / "tower", device="cpu").packed
    assert torch.equal(qwenvit.encode(photos / "a.png", model="~/tower", device="cpu").packed, expected)
    assert len(loaded) == 1  # it is the same tower


WHOLE_MODELS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"]
WHOLE_MODELS += ["qwen2_5_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe", "qwen3_omni_moe_thinker"]


@pytest.mark.parametrize("model_type", [*WHOLE_MODELS, "thinker of default sizes"])
def test_a_tower_never_overwrites_a_whole_model(capsys, tmp_path, model_type):
    if model_type in WHOLE_MODELS:
        AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    else:
        (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_omni", "thinker_config": {}}')
    before = (tmp_path / "config.json").read_bytes()
    code, _, err = run(capsys, "fetch", "demo", tmp_path)
    assert code == 1
    assert "contains the config.json of a whole model; choose an empty one" in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_bytes() == before


def test_info_needs_no_weights(capsys):
    code, out, _ = run(capsys, "info", "Qwen/Qwen2.5-VL-7B-Instruct", "--size", "448x448")
    assert code == 0
    assert "676.6 M" in out
    assert "1024 patches, 256 tokens" in out
    code, listing, _ = run(capsys, "info")
    assert code == 0
    assert "Qwen/Qwen3-VL-235B-A22B-Instruct" in listing


def test_info_load_times_the_weights(capsys, tmp_path):
    Encoder.from_pretrained("demo", device="cpu").save_pretrained(tmp_path)
    code, out, _ = run(capsys, "info", tmp_path, "--load", "--device", "cpu")
    assert code == 0
    assert "loaded" in out
    assert " s, torch.float32, cpu" in out


def test_fetch_writes_a_folder_that_loads(capsys, tmp_path):
    for _ in range(2):  # the second time it replaces a tower alone
        code, _, _ = run(capsys, "fetch", "demo", tmp_path / "tower")
        assert code == 0
    assert Encoder.from_pretrained(tmp_path / "tower").config == Encoder.from_pretrained("demo").config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "/no/such/file.png", "-m", "demo"], "no such file or folder"),
        (["encode", "{empty}", "-m", "demo"], "no images in this folder"),
        (["encode", "{photos}/a.png", "{photos}/a.png", "-m", "demo"], "same name would overwrite each other: a.png"),
        (["encode", "{photos}", "-m", "nonsense"], "is no existing path"),
        (["encode", "{photos}", "-m", "demo", "--device", "cpu", "--impl", "triton"], "impl: 'triton' cannot run here"),
        (["picture", "{photos}/notes.txt", "-m", "demo", "-o", "{empty}/p.png"], "notes.txt"),
        (["info", "no-such"], "is no existing path"),
        (["info", "--load"], "needs a MODEL"),
        (["fetch", "no-such", "{empty}"], "is no existing path"),
    ],
)
def test_failures_are_one_line_and_exit_code_1(capsys, photos, tmp_path, arguments, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (tmp_path / "empty").mkdir()
    filled = [a.format(photos=photos, empty=tmp_path / "empty") for a in arguments]
    code, _, err = run(capsys, *filled)
    assert code == 1
    lines = [line for line in err.splitlines() if line.startswith("qwenvit: error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["encode"], ["info", "demo", "--size", "big"], ["paint"]])
def test_wrong_usage_is_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("command", [[], ["encode"], ["info"], ["fetch"], ["picture"]])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: qwenvit" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["encode", "--help"], ["encode"], ["paint"]])
def test_help_and_usage_errors_import_no_torch(arguments):
    program = (
        "import sys\nfrom qwenvit.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print('imported', {'torch', 'huggingface_hub', 'qwenvit.cli.commands'} & set(sys.modules))"
    )
    finished = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert finished.stdout.splitlines()[-1] == "imported set()"
    assert finished.returncode == (0 if arguments[-1].startswith("--") else 2)


def test_written_files_have_the_permissions_of_any_new_file(capsys, photos, tmp_path):
    """safetensors alone makes files that only their owner can read."""
    run(capsys, "encode", photos, "-m", "demo", "-o", tmp_path / "out.safetensors")
    run(capsys, "fetch", "demo", tmp_path / "tower")
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "out.safetensors").stat().st_mode == expected
    assert (tmp_path / "tower" / "model.safetensors").stat().st_mode == expected
