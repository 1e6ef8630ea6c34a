"""Ways to damage an image file."""

import gzip
import zlib
from collections.abc import Callable
from random import Random

from PIL import Image

from support.pictures import encoded, iptc_of, picture

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n%%EndComments\nshowpage\n%%EOF\n"
SIGNATURES = [
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"II+\0",
    b"RIFF\xff\xff\xff\xffWEBPVP8X", b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"\0\0\0\x20ftypavif",
    b"P6 ", b"P4 ", b"Pf ", b"\0\0\x02\0", b"\0\0\x01\0", b"%!PS", b"\xc5\xd0\xd3\xc6", b"8BPS", b"qoif", b"DDS ",
    b"icns", b"\x0a\x05\x01", b"\x1c\x02", b"<svg>",
]  # fmt: skip
EXTREMES = [bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0\0\0\x80", b"\1\0\0\0"]
TEXTS = [
    b"<html>404</html>",
    b'{"error": "not found"}',
    "Foto\n".encode("utf-16"),
    b"version https://git-lfs.github.com",
]


def _changed(random: Random, data: bytes, most: int) -> bytes:
    """Give up to `most` bytes other values."""
    broken = bytearray(data)
    for _ in range(random.randint(1, most)):
        broken[random.randrange(len(data))] = random.randrange(256)
    return bytes(broken)


def _flipped(random: Random, data: bytes) -> bytes:
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]


def _filled(random: Random, data: bytes, value: int) -> bytes:
    start = random.randrange(len(data))
    length = min(random.randint(1, 64), len(data) - start)
    return data[:start] + bytes([value]) * length + data[start + length :]


def _with_extreme(random: Random, data: bytes, most: int) -> bytes:
    """Write a very large, negative or zero number of two or four bytes within the first `most`."""
    place = random.randrange(max(1, min(most, len(data) - 3)))
    value = random.choice(EXTREMES)[: random.choice([2, 4])]
    return data[:place] + value + data[place + len(value) :]


def _inserted(random: Random, data: bytes) -> bytes:
    place = random.randrange(len(data) + 1)
    return data[:place] + random.randbytes(random.randint(1, 64)) + data[place:]


def _blocks(random: Random, data: bytes) -> tuple[bytes, bytes, bytes]:
    first, last = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return data[:first], data[first:last], data[last:]


def _without_block(random: Random, data: bytes) -> bytes:
    start, _, end = _blocks(random, data)
    return start + end


def _with_block_twice(random: Random, data: bytes) -> bytes:
    start, block, end = _blocks(random, data)
    return start + block + block + end


def _with_blocks_exchanged(random: Random, data: bytes) -> bytes:
    return b"".join(reversed(_blocks(random, data)))


def _spliced(random: Random, data: bytes, other: bytes) -> bytes:
    place = random.randrange(len(data))
    return data[:place] + other[place:]


def _signed(random: Random, data: bytes) -> bytes:
    signature = random.choice(SIGNATURES)
    return signature + data[len(signature) :]


def png_chunk(kind: bytes, content: bytes, length: int | None = None) -> bytes:
    """Return a chunk of a PNG file, which may state another length than it has."""
    stated = len(content) if length is None else length
    return stated.to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def _png_with_chunk(random: Random) -> bytes:
    """Return a PNG whose metadata unpacks to 100 MB, states 2 GB, or is nonsense."""
    zeros = zlib.compress(bytes(100_000_000), 1)
    junk = random.randbytes(random.randint(1, 900))
    chunk = random.choice(
        [
            png_chunk(b"zTXt", b"key\0\0" + zeros),
            png_chunk(b"iCCP", b"icc\0\0" + zeros),
            png_chunk(b"iTXt", b"key\0\1\0\0\0" + zeros),
            png_chunk(b"tEXt", b"key\0text", 2**31 - 1),
            png_chunk(b"acTL", (2**31 - 1).to_bytes(4, "big") + bytes(4)),
            png_chunk(b"IHDR", (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"),
            *(png_chunk(kind, junk) for kind in (b"eXIf", b"PLTE", b"tRNS", b"pHYs", b"cHRM", b"fcTL", b"abcd")),
        ]
    )
    png = encoded(picture(random.choice(["RGB", "P", "L"])))
    place = random.choice([33, len(png) - 12])  # after IHDR, before IEND
    return png[:place] + chunk + png[place:]


def _gif_with_comments(random: Random) -> bytes:
    gif = encoded(picture("P"), "GIF")
    blocks, comments = random.choice([(1, 1), (1, 20_000), (10_000, 1)])
    comment = b"!\xfe" + (b"\xff" + bytes(255)) * blocks + b"\0"
    return (
        gif[:-1] + comment * comments + gif[-1:] if random.random() < 0.5 else gif[:13] + comment * comments + gif[13:]
    )


def _jpeg_with_segments(random: Random) -> bytes:
    jpeg = encoded(picture("RGB"), "JPEG")
    kind = random.choice([0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xC0, 0xDB, 0xC4, 0xDD])
    content = random.randbytes(random.choice([4, 14, 300, 65533]))
    if kind == 0xE1:
        content = b"Exif\0\0II*\0\x08\0\0\0" + content[:-14]
    segment = bytes([0xFF, kind]) + (len(content) + 2).to_bytes(2, "big") + content
    return jpeg[:2] + segment * random.choice([1, 200]) + jpeg[2:]


def _tiff_with_other_tag(random: Random) -> bytes:
    tiff = bytearray(encoded(picture("RGB"), "TIFF", compression=random.choice([None, "tiff_lzw", "jpeg", "packbits"])))
    start = int.from_bytes(tiff[4:8], "little")
    entry = start + 2 + 12 * random.randrange(int.from_bytes(tiff[start : start + 2], "little"))
    field = entry + random.choice([0, 2, 4, 8])  # tag, type, count, value
    tiff[field : field + 2] = random.choice([random.randrange(2**16), 0, 2**16 - 1]).to_bytes(2, "little")
    return bytes(tiff)


def _turned(random: Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = random.choice([0, 2, 5, 6, 8, 9, 65535])
    image = picture(random.choice(["RGB", "L"]))
    return encoded(image, random.choice(["JPEG", "PNG", "WEBP", "TIFF"]), exif=exif.tobytes())


def _animation(random: Random) -> bytes:
    kind = random.choice(["GIF", "WEBP", "TIFF", "PNG", "AVIF", "MPO"])
    frames = [picture("RGB").rotate(90 * turn) for turn in range(3)]
    return _changed(random, encoded(frames[0], kind, save_all=True, append_images=frames[1:]), 6)


def blank(random: Random, side: int) -> bytes:
    """Return a small file of a square picture: a whole PNG, or a file that states the size and ends early."""
    kind, header = random.choice(["PNG", "GIF", "JPEG", "BMP", "TGA", "PPM"]), side.to_bytes(2, "little") * 2
    if kind == "PNG":
        size = side.to_bytes(4, "big") * 2 + b"\x01\0\0\0\0"
        rows = png_chunk(b"IDAT", zlib.compress(bytes((side // 8 + 1) * side), 1))
        return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", size) + rows + png_chunk(b"IEND", b"")
    if kind == "PPM":
        return b"P6 %d %d 255\n" % (side, side) + bytes(3000)
    data = encoded(picture("RGB"), kind)
    if kind == "BMP":
        return data[:18] + side.to_bytes(4, "little") * 2 + data[26:]
    place = {"GIF": 6, "TGA": 12, "JPEG": data.find(b"\xff\xc0") + 5}[kind]
    return data[:place] + (side.to_bytes(2, "big") * 2 if kind == "JPEG" else header) + data[place + 4 :]


CHANGED: dict[str, Callable[[Random, bytes], bytes]] = {
    "nothing": lambda _, data: data,
    "end cut off": lambda random, data: data[: random.randrange(len(data))],
    "last bytes cut off": lambda random, data: data[: -random.randint(1, 16)],
    "one bit": _flipped,
    "one byte": lambda random, data: _changed(random, data, 1),
    "some bytes": lambda random, data: _changed(random, data, 16),
    "bytes of the header": lambda random, data: _changed(random, data[:64], 4) + data[64:],
    "zeros": lambda random, data: _filled(random, data, 0),
    "ones": lambda random, data: _filled(random, data, 255),
    "extreme number": lambda random, data: _with_extreme(random, data, len(data)),
    "extreme number in the header": lambda random, data: _with_extreme(random, data, 64),
    "bytes inserted": _inserted,
    "block removed": _without_block,
    "block twice": _with_block_twice,
    "blocks exchanged": _with_blocks_exchanged,
    "junk at the end": lambda random, data: data + random.randbytes(random.randint(1, 5000)),
    "junk at the start": lambda random, data: random.randbytes(random.randint(1, 64)) + data,
    "byte order mark": lambda _, data: b"\xef\xbb\xbf" + data,
    "reversed": lambda _, data: data[::-1],
    "other signature": _signed,
    "packed": lambda _, data: gzip.compress(data),
    "lines ended as on Windows": lambda _, data: data.replace(b"\n", b"\r\n"),
}
"""What is done to a file."""

JOINED: dict[str, Callable[[Random, bytes, bytes], bytes]] = {
    "other file at the end": lambda _, data, other: data + other,
    "other file at the start": lambda _, data, other: other + data,
    "spliced with another": _spliced,
}
"""What is done with two files."""

MADE: dict[str, Callable[[Random], bytes]] = {
    "emptied": lambda _: b"",
    "signature alone": lambda random: _signed(random, bytes(random.choice([0, 20, 3000]))),
    "signature and noise": lambda random: _signed(random, random.randbytes(random.randint(20, 3000))),
    "noise": lambda random: random.randbytes(random.randint(1, 3000)),
    "text": lambda random: random.choice(TEXTS),
    "EPS": lambda _: EPS,
    "EPS in IPTC": lambda _: iptc_of(EPS),
    "PNG with a chunk": _png_with_chunk,
    "GIF with comments": _gif_with_comments,
    "JPEG with segments": _jpeg_with_segments,
    "TIFF with another tag": _tiff_with_other_tag,
    "orientation": _turned,
    "animation": _animation,
    "400 million pixels": lambda random: blank(random, 20_000),
    "16 million pixels": lambda random: blank(random, 4_000),
}
"""Files that are damaged from the start."""

DAMAGES = (*CHANGED, *JOINED, *MADE)


def damaged(damage: str, random: Random, data: bytes, other: bytes) -> bytes:
    """Return a damaged file, for most kinds of damage made of `data`, for some also of `other`."""
    if damage in MADE:
        return MADE[damage](random)
    if damage in JOINED:
        return JOINED[damage](random, data, other)
    return CHANGED[damage](random, data)
