import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvit.weights.strict_json import MAX_BYTES, MAX_DEPTH, MAX_VALUES, parse_json, read_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(value=VALUES, escaped=st.booleans(), indent=st.none() | st.integers(0, 3))
def test_what_python_writes_is_read(value, escaped, indent):
    text = json.dumps(value, ensure_ascii=escaped, indent=indent).encode()
    read = parse_json(text, "x")
    # Unlike ==, repr tells 1 from 1.0 and True, and 0.0 from -0.0.
    assert repr(read) == repr(value)


@given(value=VALUES, cut=st.integers(1))
def test_half_a_text_is_refused(value, cut):
    text = json.dumps([value]).encode()
    with pytest.raises(ValueError, match=r"^x: expected JSON"):
        parse_json(text[: cut % len(text)], "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "expected JSON: Expecting value: line 1 column 1"),
        (b"{}x", "expected JSON: Extra data: line 1 column 3"),
        (b'{\n "a": nul}', "expected JSON: Expecting value: line 2 column 7"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "expected JSON: each key of an object once, got 'c' twice"),
        (b'{"a": 1, "\\u0061": 2}', "expected JSON: each key of an object once, got 'a' twice"),
        (b"\xef\xbb\xbf{}", "expected JSON without a byte order mark, got one at byte 0"),
        ("{}".encode("utf-16"), "expected JSON in UTF-8, got other bytes from byte 0 on"),
        ("{}".encode("utf-16-le"), "expected JSON: "),
        ("{}".encode("utf-32-le"), "expected JSON: "),
        (b'["\xe9"]', "expected JSON in UTF-8, got other bytes from byte 2 on"),
        (b'["\xed\xa0\x80"]', "expected JSON in UTF-8, got other bytes from byte 2 on"),
        (b'["\\ud800"]', "expected Unicode text, got half of a surrogate pair in '\\ud800'"),
        (b'{"a": {"b\\uDC00": 1}}', "expected Unicode text, got half of a surrogate pair in 'b\\udc00'"),
        (b'["\\ude00\\ud83d"]', "expected Unicode text, got half of a surrogate pair in '\\ude00\\ud83d'"),
        (b"[NaN]", "expected JSON: got NaN"),
        (b"[-Infinity]", "expected JSON: got -Infinity"),
        (b"[1e999]", "expected JSON: numbers within float64, got 1e999"),
        (b"[-" + b"9" * 5000 + b"]", "expected JSON: numbers within float64, got -9999"),
        (b'["\t"]', "expected JSON: Invalid control character"),
        (b"[01]", "expected JSON: "),
        (b"[1,]", "expected JSON: "),
        (b"{'a': 1}", "expected JSON: "),
        (b"[1] // one", "expected JSON: "),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"nested at most {MAX_DEPTH} levels deep, got 65"),
        (b'{"a":' * 5000, f"nested at most {MAX_DEPTH} levels deep, got 5000"),
        (b"[" * 10**6, f"nested at most {MAX_DEPTH} levels deep, got 1000000"),
        (b"[" + b"[]," * MAX_VALUES + b"0]", f"at most {MAX_VALUES} values, got up to {2 * MAX_VALUES + 2}"),
    ],
)
def test_what_means_nothing_or_two_things_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^dir/x.json: .*{re.escape(message)}"):
        parse_json(text, Path("dir/x.json"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'"\\\\ud800"', "\\ud800"),
        (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, None),
        (json.dumps("[{" * 1000).encode(), "[{" * 1000),
        (json.dumps([']\\"' * 9, *["[" * 99] * 99]).encode(), [']\\"' * 9, *["[" * 99] * 99]),
        (json.dumps([[]] * 1000).encode(), [[]] * 1000),
        (b"18446744073709551615", 2**64 - 1),
        (b"18446744073709551616", float(2**64)),
        (b"1000000000000000019884624838656", 1e30),  # a tokenizer's model_max_length
        (b" \r\n\t1 ", 1),
    ],
)
def test_what_is_right_is_read(text, value):
    read = parse_json(text, "x")
    assert value is None or repr(read) == repr(value)


def test_integers_have_no_negative_zero():
    assert repr(parse_json(b"-0", "x")) == "-0.0"


def test_a_file_is_read_with_its_name_in_errors(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}
    file.write_text("[]")
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: expected a JSON object, got list"):
        read_json(file)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent.json")
    with pytest.raises(ValueError, match="expected a regular file, got a folder"):
        read_json(tmp_path)


def test_a_large_file_is_not_read(tmp_path):
    file = tmp_path / "config.json"
    file.touch()
    os.truncate(file, 2**40)  # sparse
    with pytest.raises(ValueError, match=f"at most {MAX_BYTES} bytes"):
        read_json(file)
