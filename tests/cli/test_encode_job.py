"""`qwenvit encode` as a job and into one file: what is written, what is said, and how it ends."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import qwenvit
from qwenvit import cli
from qwenvit.cli import encode as encode_module
from qwenvit.cli import single_file
from qwenvit.datasets import image_batches

pytestmark = pytest.mark.filterwarnings("ignore:model='demo'")
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""An environment in which Python still has to flush what a broken stream did not take when it ends."""
DEMO = ("-m", "demo", "--device", "cpu", "--max-tokens", "4")


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        Image.linear_gradient("L").rotate(40 * number).resize((64, 64)).convert("RGB").save(folder / f"{number}.png")
    return folder


def run(capsys, *arguments):
    code = cli.main(["encode", *map(str, arguments), *DEMO])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def command(*arguments):
    return [sys.executable, "-m", "qwenvit", "encode", *map(str, arguments), *DEMO]


def rows(folder):
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def index(folder):
    return {
        row["id"]: row
        for file in sorted(folder.glob("*.index.jsonl"))
        for row in map(json.loads, file.read_text().splitlines())
    }


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


def test_of_many_errors_the_first_are_named_unless_verbose(capsys, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "MAX_ERROR_LINES", 3)
    for number in range(10, 18):
        (photos / f"{number}.png").write_bytes(b"broken")
    _, _, err = run(capsys, photos, "-o", tmp_path / "out")
    assert sum(line.startswith("qwenvit: error: ") for line in err.splitlines()) == 3
    assert "further errors only in errors.jsonl" in err
    _, _, err = run(capsys, photos, "-o", tmp_path / "out", "--verbose")
    assert sum(line.startswith("qwenvit: error: ") for line in err.splitlines()) == 8


def test_verbose_has_a_line_for_each_image_and_quiet_the_summary_alone(capsys, photos, tmp_path):
    _, out, _ = run(capsys, photos, "-o", tmp_path / "out", "--verbose")
    assert out.splitlines()[:5] == [f"{number}.png: 2x2, 4 tokens" for number in range(5)]
    _, out, err = run(capsys, photos, "-o", tmp_path / "quiet", "--quiet")
    assert out.count("\n") == 1
    assert [line for line in err.splitlines() if "random weights" not in line] == []
    _, out, _ = run(capsys, photos, "-o", tmp_path / "out.safetensors", "--quiet")
    assert out == f"5 of 5 images -> {tmp_path / 'out.safetensors'}\n"


NAMES = [b"new\nline.png", b"\x1b[31mred.png", b"\xff\xfe.png", "日本.png".encode(), b"x" * 251 + b".png", b" .png"]
IDS = ["new\nline.png", "\x1b[31mred.png", r"\xff\xfe.png", "日本.png", "x" * 251 + ".png", " .png"]


@pytest.mark.parametrize("target", ["out", "out.safetensors"])
def test_names_of_any_kind_harm_neither_the_output_nor_the_terminal(photos, tmp_path, target):
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in NAMES:
        (folder / os.fsdecode(name)).write_bytes((photos / "0.png").read_bytes())
    (folder / "broken\x1b]0;title\x07.png").write_bytes(b"broken")
    environment = os.environ | {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    # Without UTF-8 mode, the C locale's own encoding keeps what is not ASCII as surrogates.
    done = subprocess.run(
        command(folder, "-o", tmp_path / target, "-v"), capture_output=True, env=environment, check=False
    )
    assert done.returncode == 1, done.stderr
    lines = (done.stdout + done.stderr).replace(b"\n", b"")
    assert all(0x20 <= byte < 0x7F for byte in lines)
    assert b"6 of 7 images" in done.stdout
    assert rb"error: broken\x1b]0;title\x07.png: " in done.stderr
    assert rb"new\nline.png" in done.stdout
    file = tmp_path / target if target.endswith("s") else tmp_path / target / "00000.safetensors"
    assert set(qwenvit.load_embeddings(file)) == set(IDS)


def test_a_reader_that_goes_away_stops_nothing(photos, tmp_path):
    script = 'set -o pipefail; "$@" | true'
    arguments = command(photos, "-o", tmp_path / "out", "--verbose")
    done = subprocess.run(
        ["bash", "-c", script, "bash", *arguments], capture_output=True, env=BUFFERED, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert len(index(tmp_path / "out")) == 5


def test_no_place_on_the_disk_of_standard_output_stops_nothing(photos, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(photos, "-o", tmp_path / "out", "-v"),
            stdout=full,
            stderr=subprocess.PIPE,
            env=BUFFERED,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert len(index(tmp_path / "out")) == 5


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


def test_a_file_with_fewer_images_never_replaces_one_with_more(capsys, photos, tmp_path):
    target = tmp_path / "out.safetensors"
    run(capsys, photos, "-o", target)
    before = target.read_bytes()
    code, out, err = run(capsys, photos / "0.png", "-o", target)
    assert (code, out) == (1, "")
    assert "has 5 images, and the inputs are 1" in err
    (photos / "3.png").write_bytes(b"broken")
    code, out, _ = run(capsys, photos, "-o", target)
    assert code == 1
    assert "4 of 5 images -> " in out
    assert target.read_bytes() == before
    assert len(qwenvit.load_embeddings(tmp_path / "out.incomplete.safetensors")) == 4
    code, _, _ = run(capsys, photos / "0.png", "-o", target, "--overwrite")
    assert code == 0
    assert list(qwenvit.load_embeddings(target)) == ["0.png"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out.incomplete.safetensors", "out.safetensors", "photos"]


def test_a_file_of_something_else_is_not_replaced(capsys, photos, tmp_path):
    target = tmp_path / "model.safetensors"
    for content in (b"", b"something", (8).to_bytes(8, "little") + b"{}      "):
        target.write_bytes(content)
        code, _, err = run(capsys, photos, "-o", target)
        assert code == 1
        assert "is no file of embeddings" in err
        assert target.read_bytes() == content


def test_more_than_a_handful_of_images_go_into_one_file_in_batches(capsys, photos, tmp_path, monkeypatch):
    run(capsys, photos, "-o", tmp_path / "one.safetensors")
    monkeypatch.setattr(single_file, "HANDFUL", 2)
    (photos / "3.png").write_bytes(b"broken")
    code, _, err = run(capsys, photos, "-o", tmp_path / "batches.safetensors")
    assert code == 1
    assert "error: 3.png: " in err
    alone, batches = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "batches"))
    assert batches.keys() == {name for name in alone if not name.startswith("3.png")}
    assert all(torch.equal(batches[name], alone[name]) for name in batches)


@pytest.mark.parametrize("error", [OverflowError, MemoryError, torch.OutOfMemoryError])
def test_a_batch_that_is_too_much_for_one_file_is_encoded_one_by_one(capsys, photos, tmp_path, monkeypatch, error):
    monkeypatch.setattr(single_file, "HANDFUL", 2)
    stream, encode, alone = image_batches.encode_stream, qwenvit.Encoder.encode, []

    def too_much(encoder, items, *arguments, **options):
        drawn = list(items)
        yield next(stream(encoder, drawn[:1], *arguments, **options))
        raise error("too much")

    def one(self, image, **options):
        alone.append(image)
        if str(image).endswith("3.png"):
            raise error("too much")
        return encode(self, image, **options)

    monkeypatch.setattr(image_batches, "encode_stream", too_much)
    monkeypatch.setattr(qwenvit.Encoder, "encode", one)
    code, _, err = run(capsys, photos, "-o", tmp_path / "out.safetensors")
    assert code == 1
    assert "error: 3.png: too much" in err
    assert len(qwenvit.load_embeddings(tmp_path / "out.safetensors")) == 4
    assert alone


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


def test_a_full_disk_leaves_the_file_that_was_there_and_nothing_beside_it(capsys, photos, tmp_path, monkeypatch):
    target = tmp_path / "out.safetensors"
    run(capsys, photos, "-o", target)
    before, open_writer = target.read_bytes(), single_file.open_writer

    def fill(*arguments):
        writer, added = open_writer(*arguments), []
        add = writer.add

        def add_three(item):
            added.append(item)
            if len(added) > 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            add(item)

        monkeypatch.setattr(writer, "add", add_three)
        return writer

    monkeypatch.setattr(single_file, "open_writer", fill)
    code, _, err = run(capsys, photos, "-o", target)
    assert code == 1
    assert "qwenvit: error: [Errno 28] No space left on device" in err
    assert target.read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out.safetensors", "photos"]


def test_a_file_that_cannot_be_made_is_known_before_the_model_is_loaded(capsys, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(single_file, "load", lambda _: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "out.safetensors", tmp_path / f"{'x' * 300}" / "out.safetensors"):
        code, out, err = run(capsys, photos, "-o", target)
        assert (code, out) == (1, "")
        assert "qwenvit: error: " in err


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


def test_progress_is_shown_on_a_terminal(capsys, photos, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "200")
    run(capsys, photos, "-o", tmp_path / "out")
    last = [one for one in stream.getvalue().split("\r\x1b[K") if one][-1]
    assert last.startswith("5 of 5 images, ")
    assert "tokens/s, ETA 00:00, device waits " in last
