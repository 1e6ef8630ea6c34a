"""`qwenvit encode` as a job: what it takes, writes and refuses, and how it ends."""

import json
import os
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qwenvit
from qwenvit import cli
from qwenvit.cli import encode as encode_module
from qwenvit.cli import single_file
from support.encode_command import command, index, run

pytestmark = pytest.mark.filterwarnings("ignore:model='demo'")


def test_a_folder_gets_what_the_library_returns(capsys, photos, tmp_path):
    code, out, err = run(capsys, photos, "-o", tmp_path / "out")
    assert code == 0
    assert out.startswith(f"5 of 5 images -> {tmp_path / 'out'} (0 were done before; 5 in ")
    assert out.count("\n") == 1
    assert "error" not in err
    expected = qwenvit.encode(sorted(photos.iterdir()), model="demo", device="cpu", max_tokens=4)
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(shard)
    for number, item in enumerate(expected):
        torch.testing.assert_close(tensors[f"{number}.png/tokens"], item.tokens, rtol=1e-4, atol=1e-4)
    assert list(index(tmp_path / "out")) == [f"{number}.png" for number in range(5)]


def test_the_same_command_again_has_nothing_to_do_and_another_one_is_refused(capsys, photos, tmp_path):
    run(capsys, photos, "-o", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("0*")}
    code, out, _ = run(capsys, photos, "-o", tmp_path / "out")
    assert code == 0
    assert "5 of 5 images" in out
    assert "5 were done before; 0 in" in out
    code, out, err = run(capsys, photos, "-o", tmp_path / "out", "--pool", "mean")
    assert (code, out) == (1, "")
    assert "pool None, now 'mean'" in err
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").glob("0*")} == before
    code, out, _ = run(capsys, photos, "-o", tmp_path / "out", "--pool", "mean", "--overwrite")
    assert code == 0
    assert "0 were done before; 5 in" in out


@pytest.mark.parametrize("where", ["folder", "file"])
def test_what_fails_is_named_and_makes_the_exit_code_1(capsys, photos, tmp_path, where):
    (photos / "2.png").write_bytes(b"broken")
    (photos / "9.png").symlink_to(photos / "nowhere")
    target = tmp_path / "out" if where == "folder" else tmp_path / "out.safetensors"
    code, out, err = run(capsys, photos, "-o", target)
    assert code == 1
    assert "4 of 6 images" in out
    errors = [line for line in err.splitlines() if line.startswith("qwenvit: error:")]
    assert len(errors) == 2
    assert errors[0].startswith("qwenvit: error: 2.png: ")
    assert errors[1].startswith("qwenvit: error: 9.png: ")
    assert "not there" in errors[1]
    if where == "folder":
        assert f"2 failed: {target / 'errors.jsonl'}" in out
        named = [json.loads(line)["id"] for line in (target / "errors.jsonl").read_text().splitlines()]
        assert named == ["2.png", "9.png"]
        (photos / "2.png").write_bytes((photos / "1.png").read_bytes())
        (photos / "9.png").unlink()
        code, out, _ = run(capsys, photos, "-o", target)
        assert code == 0
        assert "5 of 5 images" in out


def test_a_list_on_standard_input(photos, tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.add(photos / "4.png", "inner/4.png")
    names = ["photos/1.png", "s.tar", "photos/0.png"]
    done = subprocess.run(
        command("-", "-o", "out"),
        input="\n".join(names),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(index(tmp_path / "out")) == ["photos/1.png", "s.tar/inner/4.png", "photos/0.png"]


def test_a_table_of_vectors_alone(capsys, photos, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    code, _, _ = run(
        capsys, photos, "-o", tmp_path / "out", "--format", "parquet", "--pool", "mean", "--no-tokens", "--normalize",
        "--shard-images", "2",
    )  # fmt: skip
    assert code == 0
    shards = sorted((tmp_path / "out").glob("*.parquet"))
    assert [pq.read_metadata(shard).num_rows for shard in shards] == [2, 2, 1]
    table = pq.read_table(shards[0]).to_pydict()
    assert table["id"] == ["0.png", "1.png"]
    assert sum(value**2 for value in table["pooled"][0]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "{out}", "--device", "cpu", "--devices", "cpu"], "--device, --devices: expected one of them"),
        (["-o", "{out}.safetensors", "--pool", "mean"], "--pool: only for a folder as --output"),
        (["-o", "{out}.safetensors", "--no-tokens"], "--no-tokens: only for a folder as --output"),
        (["-o", "{out}.parquet"], "expected a folder or a file called *.safetensors"),
        (["-o", "{out}", "--no-tokens"], "tokens"),
        (["-o", "{out}", "--format", "npy"], "npy"),
        (["-o", "{out}", "--shard-images", "0"], "shard_images: expected a positive integer"),
        (["-o", "{out}", "--shard-bytes", "0.1"], "shard_bytes: expected a positive integer"),
        (["-o", "{photos}"], "output: expected another folder than the input"),
    ],
    ids=str,
)
def test_impossible_arguments_are_one_line_before_anything_is_written(capsys, photos, tmp_path, arguments, message):
    filled = [one.format(out=tmp_path / "out", photos=photos) for one in arguments]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, photos, *filled)
    assert (code, out) == (1, "")
    lines = [line for line in err.splitlines() if line.startswith("qwenvit: error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("512M", 2**29), ("1.5GiB", 3 * 2**29), ("2kb", 2048)])
def test_sizes(text, size):
    from qwenvit.cli.parser import _parser

    assert _parser().parse_args(["encode", "a", "--shard-bytes", text]).shard_bytes == size


@pytest.mark.parametrize("text", ["", "G", "1X", "ten", "inf", "nan"])
def test_what_is_no_size(text, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["encode", "a", "--shard-bytes", text])
    assert stop.value.code == 2
    assert "expected a size such as 512M" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_options_of_images_alone_are_refused_with_video(capsys, photos, tmp_path, target):
    code, _, err = run(capsys, photos, "-o", tmp_path / target, "--video")
    assert code == 1
    assert "max" in err
    assert "video" in err
    assert not (tmp_path / target).exists()


def test_shards_of_an_earlier_job_are_no_images(capsys, photos, tmp_path):
    pytest.importorskip("pyarrow")
    run(capsys, photos, "-o", photos / "earlier", "--format", "parquet")
    code, _, err = run(capsys, photos, "-o", tmp_path / "out")
    assert code == 0
    assert "1 shards of embeddings that qwenvit wrote skipped" in err
    assert len(index(tmp_path / "out")) == 5


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_a_signal_ends_with_what_is_encoded_written(capsys, photos, tmp_path, monkeypatch, signum, code, target):
    """The signal comes when the second image has been reported."""
    said, before = [], encode_module.say
    module = single_file if target.endswith("s") else encode_module

    def say_and_kill(text, *arguments, **options):
        before(text, *arguments, **options)
        said.append(text)
        if text.startswith("1.png"):
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(module, "say", say_and_kill)
    for number in range(5, 40):
        (photos / f"{number}.png").write_bytes((photos / "0.png").read_bytes())
    option = ["--verbose"] if target == "out" else []
    found, out, err = run(capsys, photos, "-o", tmp_path / target, *option)
    assert found == code
    file = tmp_path / target if target.endswith("s") else tmp_path / target / "00000.safetensors"
    written = qwenvit.load_embeddings(file)
    assert 2 <= len(written) < 40
    assert f"{len(written)} of 40 images" in out
    assert signal.Signals(signum).name in err
    if target == "out":
        monkeypatch.setattr(module, "say", before)
        found, out, _ = run(capsys, photos, "-o", tmp_path / target)
        assert found == 0
        assert "40 of 40 images" in out
        assert len(index(tmp_path / target)) == 40
