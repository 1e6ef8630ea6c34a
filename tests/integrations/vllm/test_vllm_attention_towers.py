"""Attention mode in vLLM's own towers, without an engine: on one rank, split over two, and compiled."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from qwenvit.integrations.vllm.attention import WHOLE_FRAMES
from support.vllm_process import ENVIRONMENT, VARIABLES, needs_vllm

pytestmark = needs_vllm

WINDOWS = {"64": 2, str(WHOLE_FRAMES): 2}
CALLS = {"qwen2_vl": {str(WHOLE_FRAMES): 4}, "qwen2_5_vl": WINDOWS, "qwen3_vl": {str(WHOLE_FRAMES): 4}}
CALLS["qwen3_omni"] = CALLS["qwen3_vl"]
"""Calls of the operation by `max_seqlen`, one for each block."""


def run(ways, folder, ranks, **variables):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, answers = Path(__file__).parents[2] / "support/vllm_towers.py", folder / "answers.json"
    settings = {f"VLLM_{name}_ROOT": str(folder / name) for name in ("CACHE", "CONFIG")}
    settings["VLLM_DIST_IDENT"] = str(port)  # names the shared memory of the ranks, which an engine does itself
    processes = [
        subprocess.Popen(
            [ENVIRONMENT / "bin/python", program, ways, answers, str(port), str(rank), str(ranks)],
            env=os.environ | VARIABLES | settings | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    logs = [process.communicate(timeout=600)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), logs[0][-5000:]
    return json.loads(answers.read_text())


@pytest.mark.parametrize("ranks", [1, 2], ids=["one rank", "tensor parallel"])
def test_the_tokens_of_vllm_attention(ranks, tmp_path):
    answers = run("eager", tmp_path, ranks)
    assert answers.keys() == CALLS.keys()
    for family, found in answers.items():
        print(
            f"{family}: tokens differ by {found['attention']:.1e}; with a wrong scale in one block {found['wrong']:.1e}"
        )
        assert found["calls"] == CALLS[family], family
        assert found["attention"] < 1e-5, family
        assert found["wrong"] > 1e-4, family


def test_blocks_that_vllm_compiles(tmp_path):
    found = run("compiled", tmp_path, 1, TORCHDYNAMO_DISABLE="0")["qwen2_5_vl"]
    assert {way: each["compiled"] for way, each in found.items()} == {"eager": 0, "own": 4, "attention": 4}
    assert {way: each["calls"] for way, each in found.items()} == {"eager": {}, "own": {}, "attention": WINDOWS}
    assert found["attention"]["difference"] < 1e-5
