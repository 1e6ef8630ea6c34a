"""The parser of headers against safetensors' own reader, which is the truth: on drawn headers, and on damaged ones."""

import json
import os
import random
import re
import socket
from pathlib import Path

import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from qwenvit.weights import strict_json
from qwenvit.weights.header import _DTYPE_BITS, build_header, parse_header, read_header
from support.json_damage import HUGE, damaged_json

BITS = {"U8": 8, "F4": 4, "F6_E2M3": 6, "BF16": 16, "F32": 32, "I64": 64, "C64": 64}


def framed(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def truth(file: Path) -> dict[str, tuple] | None:
    """Return dtype, shape and bytes of each tensor by safetensors' own reader; None if it refuses the file."""
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError:
        return None
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for name, tensor in safetensors.deserialize(file.read_bytes())
    }


def found(file: Path) -> dict[str, tuple] | str:
    """Return the same by our parser, or its message if it refuses the file."""
    try:
        entries = read_header(file)
    except ValueError as error:
        return str(error)
    raw = file.read_bytes()
    return {name: (entry.dtype, entry.shape, raw[entry.start : entry.end]) for name, entry in entries.items()}


def is_forbidden_by_the_format(text: bytes) -> bool:
    """Whether the reader takes what the format's description forbids, or a form that no writer uses."""

    def depth(value: object) -> int:
        return 1 + max(map(depth, value), default=0) if isinstance(value, list | tuple) else 0

    def repeats(pairs: list) -> tuple:
        nonlocal repeated
        repeated |= len({key for key, _ in pairs}) < len(pairs)
        return tuple(part for pair in pairs for part in pair)

    repeated = False
    header = json.loads(text, object_pairs_hook=repeats)
    entries = dict(zip(header[::2], header[1::2], strict=True))
    entries.pop("__metadata__", None)
    other_forms = any(
        not isinstance(entry, tuple) or not isinstance(dict(zip(entry[::2], entry[1::2], strict=True))["dtype"], str)
        for entry in entries.values()
    )
    return repeated or other_forms or not text.startswith(b"{") or depth(header) > strict_json.MAX_DEPTH


def compare(file: Path, raw: bytes) -> bool | None:
    """Compare both readers; return whether they take the file, None where ours is stricter for a reason."""
    file.write_bytes(raw)
    expected, ours = truth(file), found(file)
    assert isinstance(ours, dict) or str(file) in ours
    if expected is None:
        assert isinstance(ours, str), f"{raw!r} is refused by safetensors, and not here"
        return False
    if isinstance(ours, str):
        text = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
        assert is_forbidden_by_the_format(text), f"{raw!r} is taken by safetensors, and not here: {ours}"
        return None
    assert ours == expected
    return True


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """Files that are right but for a few drawn fields."""
    fields, position = [], 0
    sizes = st.integers(0, 5) | st.sampled_from(HUGE)
    odd = st.none() | st.booleans() | st.floats(allow_nan=True) | st.text(max_size=3) | st.sampled_from([-1, -0.0])
    wrong = st.integers(0, 30).map(lambda n: n == 0)
    for _ in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(st.integers(0, 5), max_size=3)) if not draw(wrong) else draw(st.lists(sizes, max_size=4))
        bits = BITS[dtype]
        for size in shape:
            bits *= size
        end = position + (bits // 8 if bits < 10**4 else 0)
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
        if draw(wrong):
            entry["dtype"] = draw(st.sampled_from(["f32", "F128", "", {"F32": None}, None, 1, ["F32"]]))
        if draw(wrong):
            entry["data_offsets"] = draw(st.lists(sizes | st.integers(-3, 40) | odd, max_size=3))
        if draw(wrong):
            entry["shape"] = draw(odd | st.lists(odd, max_size=2))
        if draw(wrong):
            entry[draw(st.text(max_size=3))] = draw(st.recursive(odd, st.lists, max_leaves=4))
        if draw(wrong):
            del entry[draw(st.sampled_from(sorted(entry)))]
        fields.append((draw(st.text(max_size=4)), list(entry.values()) if draw(wrong) else entry))
    if draw(st.booleans()):
        values = st.text(max_size=3) if not draw(wrong) else st.text(max_size=3) | odd
        metadata = st.dictionaries(st.text(max_size=3), values, max_size=2)
        fields.append(("__metadata__", draw(metadata if not draw(wrong) else odd | st.lists(odd))))
    fields = draw(st.permutations(fields))
    text = "{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in fields) + "}"
    return framed(text.encode() + b" " * draw(st.integers(0, 2)), bytes(position + draw(wrong)))


@settings(max_examples=400, deadline=None)
@given(raw=headers())
@example(framed(b""))
@example(framed(b"{}"))
@example(framed(b"{}", b"1"))
@example(framed(b'{"a":{"dtype":"F32","shape":[%d,%d,0],"data_offsets":[0,0]}}' % (2**60, 2**60)))
@example(framed(b'{"a":{"dtype":"F32","shape":[0,%d,%d],"data_offsets":[0,0]}}' % (2**60, 2**60)))
@example(framed(b'{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}', b"1"))
@example(framed(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'))
def test_drawn_headers_are_taken_or_refused_as_by_safetensors(tmp_path_factory, raw):
    compare(tmp_path_factory.getbasetemp() / "drawn.safetensors", raw)


SOUND = [
    framed(
        json.dumps(
            {
                "__metadata__": {"format": "pt", "note": "é😀"},
                "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
                "b.c": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]},
                "empty": {"dtype": "I64", "shape": [0, 3], "data_offsets": [10, 10]},
            },
            ensure_ascii=escaped,
        ).encode(),
        bytes(range(10)),
    )
    for escaped in (True, False)
]


def damaged(generator: random.Random) -> bytes:
    """Return a sound file with one to three mutations."""
    raw = generator.choice(SOUND)
    length = int.from_bytes(raw[:8], "little")
    text, data = raw[8 : 8 + length], raw[8 + length :]
    for _ in range(generator.choice([1, 1, 2, 3])):
        match generator.randrange(9):
            case 0:
                data = generator.choice([data[:-1], data + b"\0", b"", data * 2])
            case 1:
                lie = generator.choice([0, 1, 7, len(text) - 1, len(text) + 1, 2**31, 2**60, 2**64 - 1, 10**8])
                return max(lie, 0).to_bytes(8, "little") + text + data
            case _:
                text = damaged_json(text, generator)
    return framed(text, data)


@pytest.mark.parametrize("seed", range(2))
def test_damaged_files_are_taken_or_refused_as_by_safetensors(tmp_path, seed):
    generator = random.Random(seed)
    outcomes = [compare(tmp_path / "damaged.safetensors", damaged(generator)) for _ in range(1000)]
    assert min(outcomes.count(outcome) for outcome in (True, False)) > 10  # both are met


def test_dtypes_are_those_of_safetensors(tmp_path):
    # Its message lists them.
    (tmp_path / "a.safetensors").write_bytes(framed(b'{"a":{"dtype":"?","shape":[8],"data_offsets":[0,8]}}', bytes(8)))
    with pytest.raises(SafetensorError) as refusal:
        safe_open(tmp_path / "a.safetensors", "pt")
    assert set(re.findall("`(.*?)`", str(refusal.value).partition("expected")[2])) == set(_DTYPE_BITS)
    for dtype, bits in _DTYPE_BITS.items():
        text = b'{"a":{"dtype":"%s","shape":[8],"data_offsets":[0,%d]}}' % (dtype.encode(), bits)
        assert compare(tmp_path / "a.safetensors", framed(text, bytes(bits)))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"dtype": "F32"}, r"'a\.b': expected an object with dtype, shape and data_offsets, got {'dtype': 'F32'}"),
        ({"dtype": "F99"}, r"'a\.b': dtype: expected one of .*, F32, .*, got 'F99'"),
        ({"shape": [1, -1]}, r"'a\.b': shape: expected a list of .*, got \[1, -1\]"),
        ({"shape": [2**62, 4]}, r"'a\.b': shape: expected a size that 64 bits can count, got \[4611686018427387904, 4"),
        ({"shape": [True]}, r"'a\.b': shape: expected a list of .* integers, got \[True\]"),
        ({"data_offsets": [4, 0]}, r"'a\.b': data_offsets: expected where the tensor starts and ends, got \[4, 0\]"),
        ({"shape": [2]}, r"'a\.b': F32 of shape \[2\] cannot take 4 bytes"),
        ({"data_offsets": [1, 5]}, r"expected 'a\.b' to start at byte 72, got 73"),
    ],
)
def test_a_refusal_names_file_tensor_and_field(fields, part):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    entry = fields if fields == {"dtype": "F32"} else entry | fields
    text = json.dumps({"a.b": entry}).encode().ljust(64)
    with pytest.raises(ValueError, match=r"^x\.safetensors: broken header: " + part):
        parse_header(text, Path("x.safetensors"), None)


@pytest.mark.parametrize("value", ["1", "null", "{}", '["a"]'])
def test_a_refusal_names_the_metadata(value):
    text = b'{"__metadata__":{"made_by":%s}}' % value.encode()
    with pytest.raises(ValueError, match="x: broken header: __metadata__: 'made_by': expected a string, got "):
        parse_header(text, Path("x"), None)


@pytest.mark.parametrize("kept", [0, 5, 8, 40, -1])
def test_truncated_file_is_refused_with_both_sizes(tmp_path, kept):
    file = tmp_path / "a.safetensors"
    raw = SOUND[0][:kept]
    assert not compare(file, raw)
    with pytest.raises(ValueError, match="truncated") as error:
        read_header(file)
    assert str(len(raw)) in str(error.value)
    assert kept != -1 or str(len(SOUND[0])) in str(error.value)


@pytest.mark.parametrize("extra", [1, 8, 1000])
def test_trailing_bytes_are_refused_with_both_sizes(tmp_path, extra):
    raw = SOUND[0] + bytes(extra)
    assert compare(tmp_path / "a", raw) is False
    with pytest.raises(ValueError, match=f"too long: expected {len(SOUND[0])} bytes by its header, got {len(raw)}"):
        read_header(tmp_path / "a")


@pytest.mark.parametrize("piece", ["[", "{", '{"a":', "[[],", "[]", "0,", '"",', '"\\"[', " ", "\0", "9"])
def test_a_long_header_is_refused_before_it_is_parsed(tmp_path, piece):
    """30 MB that a parser could take for millions of values or for a deep nest: it would take minutes, or crash."""
    text = ('{"a":' + piece * (30_000_000 // len(piece))).encode()
    file = tmp_path / "a.safetensors"
    assert compare(file, framed(text)) is False


def test_a_length_that_lies_reads_nothing(tmp_path):
    file = tmp_path / "a.safetensors"
    for length in (10**8 + 1, 2**60, 2**64 - 1):
        file.write_bytes(length.to_bytes(8, "little"))
        os.truncate(file, 2**40)  # sparse
        with pytest.raises(ValueError, match=f"a header of {length} bytes, more than the format's limit of 100000000"):
            read_header(file)


@pytest.mark.skipif(os.name != "posix", reason="named pipes and devices")
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    (tmp_path / "link.safetensors").symlink_to(pipe)
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(str(tmp_path / "socket.safetensors"))
    for file, kind in (
        (pipe, "named pipe"),
        (tmp_path / "link.safetensors", "named pipe"),
        (Path("/dev/zero"), "device"),
        (tmp_path, "folder"),
        (tmp_path / "socket.safetensors", "socket"),
    ):
        with pytest.raises(ValueError, match=f"{re.escape(str(file))}: expected a regular file, got a {kind}"):
            read_header(file)
    bound.close()
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "absent")


def test_a_link_to_a_file_is_read(tmp_path):
    # So are files in the Hub's cache.
    (tmp_path / "blob").write_bytes(SOUND[0])
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "blob")
    assert set(read_header(tmp_path / "a.safetensors")) == {"a", "b.c", "empty"}


def test_built_headers_are_read_by_both(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(SOUND[1])
    entries = read_header(file)
    head, starts = build_header(entries, {"note": "é😀"})
    raw = bytearray(len(head) + sum(entry.nbytes for entry in entries.values()))
    raw[: len(head)] = head
    for name, entry in entries.items():
        raw[starts[name] : starts[name] + entry.nbytes] = SOUND[1][entry.start : entry.end]
    tensors = found(file)
    assert compare(file, bytes(raw))
    assert found(file) == tensors
