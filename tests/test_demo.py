"""What the demo must show, on the demo itself: minutes of work, so behind the marker."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_guidance_is_seen_to_work(tmp_path):
    subprocess.run([sys.executable, str(ROOT / "scripts" / "demo.py"), "--out", str(tmp_path)], check=True)
    judge_shows_it(json.loads((tmp_path / "scores.json").read_text()))


def judge_shows_it(table):
    """The judge knows real digits; unguided samples are of any class, guided ones as asked, at the price of recall."""
    real, ddpm = table[0], [row for row in table if row["sampler"].startswith("DDPM")]
    by_scale = {row["scale"]: row for row in ddpm}
    assert real["label_agreement"] >= 0.97
    assert 0.05 <= by_scale[0]["label_agreement"] <= 0.16  # 500 samples of ten classes
    assert max(row["label_agreement"] for row in ddpm) >= 0.95
    agreement = [by_scale[scale]["label_agreement"] for scale in sorted(by_scale)]
    assert agreement == sorted(agreement)
    strongest = by_scale[max(by_scale)]
    assert strongest["recall"] < by_scale[3]["recall"] and strongest["recall"] < by_scale[0]["recall"] - 0.05
