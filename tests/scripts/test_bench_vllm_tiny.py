"""`scripts/bench_vllm.py --tiny` with real vLLM engines: every mode computes what vLLM's own tower does."""

import json
import os
import subprocess

import pytest

from qwenvit import parity
from support.vllm_process import ENVIRONMENT, TOLERANCE, needs_vllm
from vllm_bench.cases import ATTENTION, CROWD_CASE, MODELS, OFF, PIXELS, PLUGIN, VIDEO_CASE
from vllm_bench.engine_options import SCRIPTS

pytestmark = needs_vllm

MODES = [OFF, PLUGIN, PIXELS, ATTENTION]
CASES = ["448²", VIDEO_CASE, "4 × 896²", CROWD_CASE]


@pytest.mark.parametrize("model", MODELS)
def test_a_tiny_model_in_real_engines(model, tmp_path):
    figures = tmp_path / "figures.json"
    command = [ENVIRONMENT / "bin" / "python", SCRIPTS / "bench_vllm.py", "--tiny", "--models", model, "--rounds", "1"]
    command += ["--cases", *CASES, "--modes", *MODES, "--seconds", "800", "--start-seconds", "400"]
    done = subprocess.run(
        [*command, "--work", tmp_path / "work", "--json", figures],
        env=os.environ | {"PYTHONPATH": str(SCRIPTS.parent)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    (result,) = json.loads(figures.read_text())
    print(done.stdout)
    assert result["failed"] == []
    assert [row["name"] for row in result["tower"]] == ["448²", VIDEO_CASE]
    for row in result["tower"]:
        assert set(row["times"]) == {OFF, PLUGIN, ATTENTION}
        assert max(error for errors in row["errors"].values() for error in errors) < parity.FP32_BOUND
    compared = result["agreement"]["modes"]
    assert set(compared) == {OFF, PLUGIN, PIXELS}
    for row in compared.values():
        assert max(row["errors"]) < parity.FP32_BOUND
        assert row["most"] < TOLERANCE
        assert row["same"] == result["agreement"]["requests"]
    assert result["agreement"]["same_bits"] is True
    assert compared[PIXELS]["bytes"] is True
    assert result["agreement"]["other"] > 100 * TOLERANCE  # the pictures matter
    assert [row["name"] for row in result["requests"]] == ["448²", "4 × 896²"]
    for row in result["requests"]:
        assert set(row["times"]) == {OFF, PLUGIN, PIXELS}
        for stages in row["stages"].values():
            stage = {name: found["median"] for name, found in stages.items()}
            assert 0 < stage["tower"] <= stage["encoder step"] < stage["execute_model"] < stage["whole request"]
            assert 0 < stage["text forward"] < stage["execute_model"]
            assert 0 < stage["processor"] < stage["whole request"]
    assert set(result["crowd"]["times"]) == {OFF, PLUGIN, PIXELS}
