"""Another process that fetches a tower from the local Hub, with an environment of its own."""

import os
import subprocess
import sys
from pathlib import Path

from qwenvit.weights.hub import ranges
from support.hub_server import Hub

ROOT = Path(__file__).parents[2]


def start(hub: Hub, home: Path, script: str = "", **environment: str) -> subprocess.Popen[str]:
    code = (
        f"from qwenvit.weights.hub import fetch, ranges; ranges.CHUNK_BYTES = {ranges.CHUNK_BYTES}\n"
        f"print(fetch.fetch_tower('org/model'{script}))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = clean | {"HF_HOME": str(home), "HF_ENDPOINT": hub.url} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, **pipes)


def path_from(process: subprocess.Popen[str]) -> Path:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return Path(out.strip())
