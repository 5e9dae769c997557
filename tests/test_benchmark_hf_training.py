"""``benchmarks/hf_training.py``: rows of both providers, and less memory in the loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "hf_training.py"
PLAIN = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are counted on Linux alone")
def test_rows_have_times_and_peaks(tmp_path):
    small = ["--hidden", "64", "--layers", "1", "--length", "64", "--batch", "8", "--rounds", "3"]
    vocabularies = ["--vocab", "512", "--large-vocab", "65536", "--device", "cpu"]
    command = [sys.executable, "-P", str(SCRIPT), *small, *vocabularies, "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--dtype", "float32"], env=PLAIN, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "hf_training.json").read_text())
    rows = {(row["mode"], row["provider"]): row for row in content["rows"]}
    assert len(rows) == 6
    for provider in ("transformers", "fastlm"):
        row = rows["step", provider]
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert (row["dtype"], row["shape"]["vocab"]) == ("float32", 512)
    ours, theirs = (rows["fwd_bwd", name]["peak_mib"] for name in ("fastlm", "transformers"))
    assert 2 * ours < theirs
    assert "absent" in rows["step", "liger"]
