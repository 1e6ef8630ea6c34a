"""A Hub that lies: the tower is fetched whole and right, or refused, and nothing is written outside the cache.

Each case draws one to three lies about some of the replies. The server runs in the worker; huggingface_hub's session is
shared by all cases, as in a program that outlives a bad mirror.
"""

import functools
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from fuzz.frame import Case, DifferentError
from qwenvit.weights.hub import ranges, reader, session
from qwenvit.weights.hub.fetch import fetch_config, fetch_tower
from support.hub_server import Hub, Reply

DOCUMENTED = (ValueError, OSError)
STATUSES = (100, 199, 200, 204, 206, 226, 300, 301, 302, 304, 307, 400, 401, 403, 404, 408, 410, 416, 418, 429, 451)
STATUSES += (500, 501, 502, 503, 504, 511, 599)
COMMITS = ("../../../../x", "/tmp/x", "A" * 40, "b" * 40, "a" * 39, "", 7, None, {"a": 1}, "a" * 40 + "\n", "..", "\0")
NAMES = ("../x", "/etc/passwd", "a/../../x", "..", "a\\x", "", 5, None, "model.safetensors", "config.json", "x" * 5000)
TEXTS = ("", "x", "\x7f", "../../x", "9" * 5000, "-1", "0", '"', "W/", "bytes 0-0/1", "a" * 40, "f" * 64, "gzip", "é")
TARGETS = (
    "file:///etc/passwd",
    "http://[",
    "//",
    "/",
    "ftp://localhost/",
    "data:,x",
    "http://127.0.0.1:1/",
    "\x01",
    "",
)
HEADERS = ("ETag", "X-Linked-Etag", "X-Repo-Commit", "Content-Range", "X-Linked-Size", "Content-Encoding", "Location")
HEADERS += ("Retry-After", "X-Error-Code", "X-Error-Message", "Accept-Ranges", "Content-Type", "Content-Length")
HEADERS += ("Transfer-Encoding", "Set-Cookie", "X-HF-Warning", "Connection", "Last-Modified")

# There are no hashes of parts of files: nothing can tell that their bytes were changed.
BLIND = {"changed bytes", "another tensor header"}

Lie = Callable[[random.Random, str, Reply], None]


@functools.cache
def tower() -> dict[str, torch.Tensor]:
    """Return the tensors of a Qwen3.5 tower of one block, with random numbers."""
    modules = ["patch_embed.proj", "blocks.0.norm1", "blocks.0.norm2", "blocks.0.attn.qkv", "blocks.0.attn.proj"]
    modules += ["blocks.0.mlp.linear_fc1", "blocks.0.mlp.linear_fc2", "merger.norm"]
    modules += ["merger.linear_fc1", "merger.linear_fc2"]
    names = [f"{module}.{parameter}" for module in modules for parameter in ("weight", "bias")] + ["pos_embed.weight"]
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(5 + index, 20, generator=generator) for index, name in enumerate(names)}


@functools.cache
def served(adapter: bool, separate: bool) -> Path:
    """Return the folder of a repository, made once."""
    folder = Path(tempfile.mkdtemp(prefix="qwenvit-fuzz-hub-"))
    (folder / "config.json").write_text('{"model_type": "qwen3_5", "vision_config": {"depth": 1}}')
    (folder / "preprocessor_config.json").write_text('{"patch_size": 4}')
    tensors = {f"model.visual.{name}": tensor for name, tensor in tower().items()}
    if separate:
        save_file(tensors, folder / "model_visual.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(1000)}, folder / "model.safetensors")
    if adapter:
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        save_file({"base_model.model.x.lora_A.weight": torch.ones(4, 4)}, folder / "adapter_model.safetensors")
    return folder


def cases(seed: int, count: int) -> Iterator[Case]:
    """Yield `count` servers with their lies."""
    for index in range(count):
        generator = random.Random(f"{seed}/{index}")
        names = generator.sample(sorted(LIES), generator.choice((1, 1, 1, 2, 3)))
        when = generator.choice(("always", "once", "sometimes", "at the third"))
        kinds = generator.choice(((""), ("/api/"), ("/resolve/"), (".safetensors"), ("config.json")))
        description = f"{', '.join(names)} {when}, in replies about {kinds or 'anything'}"
        yield Case(description, functools.partial(run, f"{seed}/{index}", names, when, kinds))


def run(seed: str, names: list[str], when: str, kinds: str, folder: Path) -> None:
    """Fetch from a Hub with these lies, then from an honest one into the same cache, and compare."""
    generator, count = random.Random(f"{seed}/lies"), 0
    cache, outside = folder / "a" / "b" / "cache", folder / "a"
    cache.mkdir(parents=True)
    reader.RETRY_WAITS_S, session.SPEED_WINDOW_S, reader.MAX_RETRY_AFTER_S = (0.0, 0.0), 0.4, 0.2
    session.SLOWEST_BYTES_PER_S, ranges.CHUNK_BYTES = 4096, generator.choice((2 << 10, 16 << 10))

    def lie(method: str, path: str, reply: Reply) -> None:
        nonlocal count
        if kinds not in path:
            return
        count += 1
        chosen = {"always": True, "once": count == 1, "at the third": count == 3}
        if chosen.get(when, generator.random() < 0.3):
            for name in names:
                LIES[name](generator, path, reply)

    origin = served(generator.random() < 0.3, generator.random() < 0.5)
    with Hub(origin, lists_hashes=generator.random() < 0.7) as hub:
        constants.ENDPOINT = hub.url
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        constants.HUGGINGFACE_CO_URL_TEMPLATE = template
        hub.lie = lie
        fetch = fetch_config if generator.random() < 0.1 else fetch_tower
        failure: Exception | None = None
        try:
            found = fetch("org/model", cache_dir=cache, force_download=generator.random() < 0.3)
            if fetch is fetch_tower:
                compare(found, origin, names, hub.lists_hashes)
        except DOCUMENTED as error:
            failure = error
        finally:
            hub.go_on.set()
            written = [file for file in outside.rglob("*") if file.is_file() and cache not in file.parents]
            if written or not {*cache.iterdir()} <= {cache / "assets"}:
                raise DifferentError(f"written outside the cache: {written or [*cache.iterdir()]}")
        # What the lies left behind must not harm an honest download.
        hub.lie = None
        if "another commit" not in names:  # which the server may say, and which pins the branch
            try:
                honest = fetch_tower("org/model", cache_dir=cache)
            except DOCUMENTED as error:
                raise DifferentError(f"an honest download after the lies failed: {error!r}") from error
            compare(honest, origin, names, hub.lists_hashes)
    if failure is not None:
        raise failure


def compare(found: Path, origin: Path, names: list[str], hashed: bool) -> None:
    """Raise DifferentError unless the fetched files are the served ones, where anything could tell the difference."""
    state, expected = load_file(found / "model.safetensors"), tower()
    if not BLIND & {*names} and not (
        state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    ):
        raise DifferentError("other tensors")
    for name in ("config.json", "preprocessor_config.json", "adapter_config.json", "adapter_model.safetensors"):
        # A listing may leave out a file.
        if hashed and (found / name).is_file() and (found / name).read_bytes() != (origin / name).read_bytes():
            raise DifferentError(f"another {name}")


def _listing(change: Callable[[random.Random, dict], None]) -> Lie:
    def lie(generator: random.Random, path: str, reply: Reply) -> None:
        if "/api/" in path and reply.body:
            try:
                listing = json.loads(reply.body)
                change(generator, listing)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                return  # another lie was there first
            _replace(reply, json.dumps(listing).encode())

    return lie


def _replace(reply: Reply, body: bytes) -> None:
    reply.body = body
    reply.fields["Content-Length"] = str(len(body))


def _set(**changes: object) -> Lie:
    def lie(_: random.Random, __: str, reply: Reply) -> None:
        for name, value in changes.items():
            setattr(reply, name, value)

    return lie


def _status(generator: random.Random, _: str, reply: Reply) -> None:
    reply.status = generator.choice(STATUSES)


def _redirect(generator: random.Random, path: str, reply: Reply) -> None:
    reply.status = generator.choice((301, 302, 303, 307, 308))
    reply.fields["Location"] = generator.choice((*TARGETS, path, path + "x"))


def _header(generator: random.Random, _: str, reply: Reply) -> None:
    reply.fields[generator.choice(HEADERS)] = generator.choice(TEXTS).encode("utf-8").decode("latin-1")


def _no_header(generator: random.Random, _: str, reply: Reply) -> None:
    reply.fields.pop(generator.choice(sorted(reply.fields)), None)


def _many_headers(generator: random.Random, _: str, reply: Reply) -> None:
    reply.fields |= {f"X-{index}": "x" * generator.choice((1, 200)) for index in range(generator.choice((300, 3000)))}


def _range(generator: random.Random, _: str, reply: Reply) -> None:
    first, last, total = (generator.choice((0, 1, 100, 1 << 20, 1 << 60, 10**30)) for _ in range(3))
    reply.fields["Content-Range"] = f"bytes {first}-{last}/{generator.choice((total, '*'))}"


def _total(generator: random.Random, _: str, reply: Reply) -> None:
    if "Content-Range" in reply.fields:
        given = reply.fields["Content-Range"].rpartition("/")
        total = generator.choice((given[2], "*", "0", str(1 << 60), f"{given[2]}0"))
        reply.fields["Content-Range"] = f"{given[0]}/{total}"


def _length(generator: random.Random, _: str, reply: Reply) -> None:
    length = len(reply.body) + generator.choice((-10, -1, 1, 10, 1 << 40))
    reply.fields["Content-Length"] = str(max(0, length))


def _cut(generator: random.Random, _: str, reply: Reply) -> None:
    reply.cut = generator.randrange(len(reply.body) + 1)


def _shorter(generator: random.Random, _: str, reply: Reply) -> None:
    _replace(reply, reply.body[: generator.randrange(len(reply.body) + 1)])


def _longer(generator: random.Random, _: str, reply: Reply) -> None:
    _replace(reply, reply.body + generator.randbytes(generator.choice((1, 1000, 1 << 20))))


def _changed(generator: random.Random, _: str, reply: Reply) -> None:
    if reply.body:
        place = generator.randrange(len(reply.body))
        changed = bytes([reply.body[place] ^ 1 << generator.randrange(8)])
        reply.body = reply.body[:place] + changed + reply.body[place + 1 :]


def _huge_error(generator: random.Random, _: str, reply: Reply) -> None:
    reply.status, reply.endless = generator.choice((404, 500, 503)), generator.random() < 0.5
    reply.body = b"x" * (8 << 20)
    reply.fields |= {"Content-Length": str(600 << 20), "Content-Type": "application/json"}


def _odd_error(generator: random.Random, _: str, reply: Reply) -> None:
    reply.status = generator.choice((400, 401, 403, 404, 429, 500))
    _replace(reply, generator.choice((b"[1]", b"{", b'{"error": {"a": 1}}', b"\xff\xfe", b"<html>", b'{"errors": 3}')))


def _etag(generator: random.Random, _: str, reply: Reply) -> None:
    reply.fields["ETag"] = f'"{generator.randrange(3)}"'


def _hash(generator: random.Random, listing: dict) -> None:
    entry = generator.choice(listing["siblings"])
    entry["lfs"] = {"sha256": generator.choice(("f" * 64, "x" * 64, "f" * 63, 5, None)), "size": 3}


def _size(generator: random.Random, listing: dict) -> None:
    generator.choice(listing["siblings"])["size"] = generator.choice((-1, 0, 5, 1 << 60, 1.5, "9", True, None))


def _tensor_header(generator: random.Random, path: str, reply: Reply) -> None:
    """Change a digit or a letter of the JSON header of a safetensors file."""
    if path.endswith(".safetensors") and reply.fields.get("Content-Range", "").startswith("bytes 0-"):
        place = generator.randrange(min(len(reply.body), 3000))
        reply.body = reply.body[:place] + bytes([generator.randrange(32, 127)]) + reply.body[place + 1 :]


def _giant_header(generator: random.Random, path: str, reply: Reply) -> None:
    if path.endswith(".safetensors") and reply.fields.get("Content-Range", "").startswith("bytes 0-"):
        length = generator.choice((1 << 20, 99_000_000, 1 << 40, (1 << 64) - 1))
        reply.body = length.to_bytes(8, "little") + reply.body[8:]


LIES: dict[str, Lie] = {
    "a status": _status,
    "a redirect": _redirect,
    "a redirect with an endless body": lambda g, p, r: (_redirect(g, p, r), _set(endless=True)(g, p, r))[0],
    "a header": _header,
    "two headers": lambda g, p, r: (_header(g, p, r), _header(g, p, r))[0],
    "a header less": _no_header,
    "many headers": _many_headers,
    "another range": _range,
    "another total": _total,
    "another length": _length,
    "no length": lambda _, __, reply: reply.fields.pop("Content-Length", None),
    "an early end": _cut,
    "a shorter body": _shorter,
    "a longer body": _longer,
    "an empty body": lambda _, __, reply: _replace(reply, b""),
    "changed bytes": _changed,
    "an endless body": _set(endless=True),
    "a body in drips": _set(drips=True),
    "headers in drips": _set(slow_head=True),
    "a huge error": _huge_error,
    "an odd error": _odd_error,
    "a long wait": lambda g, _, reply: reply.fields.update({"Retry-After": g.choice(("1", "99999", "x", "-1"))}),
    "an ETag": _etag,
    "a weak ETag": lambda _, __, reply: reply.fields.update({"ETag": 'W/"1"'}),
    "an odd reason": lambda g, _, reply: setattr(reply, "reason", g.choice(("", "x" * 70_000, "\x00", "é"))),
    "another commit": _listing(lambda _, listing: listing.update(sha="b" * 40)),
    "an odd commit": _listing(lambda g, listing: listing.update(sha=g.choice(COMMITS))),
    "an odd name": _listing(lambda g, listing: g.choice(listing["siblings"]).update(rfilename=g.choice(NAMES))),
    "a name more": _listing(lambda g, listing: listing["siblings"].append({"rfilename": g.choice(NAMES)})),
    "a name less": _listing(lambda g, listing: listing["siblings"].pop(g.randrange(len(listing["siblings"])))),
    "another hash": _listing(_hash),
    "another git hash": _listing(lambda g, listing: g.choice(listing["siblings"]).update(blobId="e" * 40)),
    "another size": _listing(_size),
    "odd siblings": _listing(lambda g, listing: listing.update(siblings=g.choice((None, 3, [], [3], {}, "x")))),
    "no JSON": lambda g, _, reply: _replace(reply, g.choice((b"", b"[" * 10**5, b"null", b"\xff", b"{}", b"<html>"))),
    "another tensor header": _tensor_header,
    "a giant tensor header": _giant_header,
}
