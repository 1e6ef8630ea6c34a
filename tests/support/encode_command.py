"""`qwenvit encode` with the demo model, in this process or another, and the index of what it wrote."""

import json
import sys

from qwenvit import cli

DEMO = ("-m", "demo", "--device", "cpu", "--max-tokens", "4")


def run(capsys, *arguments):
    code = cli.main(["encode", *map(str, arguments), *DEMO])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def command(*arguments):
    return [sys.executable, "-m", "qwenvit", "encode", *map(str, arguments), *DEMO]


def index(folder):
    return {
        row["id"]: row
        for file in sorted(folder.glob("*.index.jsonl"))
        for row in map(json.loads, file.read_text().splitlines())
    }
