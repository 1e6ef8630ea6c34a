"""Damage to JSON texts: bits, tokens and encodings, drawn from a seeded generator."""

import random
import re

HUGE = [2**31, 2**32, 2**53, 2**59, 2**60, 2**61, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**65, 10**30, 10**400]
"""Sizes around which integers overflow."""
TOKENS = [
    b"null", b"true", b"NaN", b"Infinity", b"-1", b"-0", b"0", b"00", b"1.0", b"1e2", b"1e999", b"2.", b'""', b"[]",
    b"{}", b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\", b"\\ud800", b"\\udc00x", b"\\ud83d\\ude00", b"\\u0000",
    b"\x00", b"\x1f", b"\x7f", b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80", "é".encode(), b" ", b"\n\t\r ", b"\x0b",
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"a"', b'"F32"', b'"f32"', b'"F8"', b"/*x*/",
    b"[" * 60, b"[" * 200, b"[" * 5000, b'{"a":' * 3000, *(str(number).encode() for number in HUGE),
]  # fmt: skip
"""What is put in place of a token or between two."""


def damaged_json(text: bytes, generator: random.Random) -> bytes:
    """Return the text with one mutation."""
    spans = [match.span() for match in re.finditer(rb'"[^"]*"|-?[0-9.]+|.', text)] or [(0, 0)]
    (start, end), (other, other_end) = generator.choice(spans), generator.choice(spans)
    match generator.randrange(7):
        case 0:
            return text[:start] + generator.choice(TOKENS) + text[end:]
        case 1:
            return text[:start] + generator.choice(TOKENS) + text[start:]
        case 2:
            return text[:start] + text[end:]
        case 3:
            return text[:start] + text[other:other_end] + text[end:]
        case 4:
            return text[:start] + text[min(start, other) : max(start, other)] + text[start:]
        case 5:
            return flipped_bit(text, generator)
        case _:
            utf_16 = text.decode("utf-8", "replace").encode("utf-16")
            return generator.choice([utf_16, b"\xef\xbb\xbf" + text, text[:start], text + b" \n"])


def flipped_bit(data: bytes, generator: random.Random) -> bytes:
    """Return the bytes with one bit flipped."""
    flipped = bytearray(data or b"x")
    flipped[generator.randrange(len(flipped))] ^= 1 << generator.randrange(8)
    return bytes(flipped)
