"""benchmarks/grids_on_gpu.py: what is done, what is left, and whole runs side by side, on the CPU."""
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


def asked(folder, seconds, jobs=2):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ["plan.yaml", "-o", "out", "--results", "tars", "--jobs", str(jobs), "--seconds", str(seconds)]
    command = [sys.executable, str(ROOT / "benchmarks/grids_on_gpu.py"), *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=400)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it starts its processes by fork")
def test_runs_end_are_packed_and_are_not_done_twice_and_a_failure_is_told(tmp_path):
    common = dict(data="shapes", limit=64, img_size=32, model="test_vit", epochs=1, batch_size=32, entropy_schedule="constant", recovery_interval=0,
                  device="cpu")
    arms = dict(plain=dict(regularizer="none"), corrected=dict(regularizer="chance-corrected", entropy_weight=.3), broken=dict(mixup=.8, batch_size=31))
    (tmp_path / "small").mkdir()
    (tmp_path / "small/grid.yaml").write_text(yaml.safe_dump(dict(common=common, arms=arms, seeds=[1, 2])), encoding="utf-8")
    entry = dict(grid="small/grid.yaml", arms=["plain", "corrected"], seconds=1, tests={"again.json": dict(masks="shapes")})
    never = entry | dict(arms=["plain"], seeds=[2], seconds=100_000)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump([entry | dict(seeds=[1]), entry | dict(arms=["broken"], seeds=[1]), never]), encoding="utf-8")
    done = asked(tmp_path, 300)
    assert done.returncode == 1 and "FAILED out/small/broken-seed1" in done.stdout, done.stdout + done.stderr
    names = tarfile.open(tmp_path / "tars/runs.tar.gz").getnames()
    for arm in ("plain", "corrected"):
        assert {f"small/{arm}-seed1/{f}" for f in ("config.yaml", "evaluation.json", "again.json")} <= set(names)
    assert not any("broken" in n or "seed2" in n for n in names)
    assert {f"small/{arm}-seed1/model.safetensors" for arm in ("plain", "corrected")} == set(tarfile.open(tmp_path / "tars/weights-1.tar").getnames())
    before = (tmp_path / "out/small/plain-seed1/again.json").stat().st_mtime_ns
    assert json.loads((tmp_path / "out/small/plain-seed1/again.json").read_text(encoding="utf-8"))["mask_pairs"] > 0
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump([entry | dict(seeds=[1])]), encoding="utf-8")
    assert asked(tmp_path, 300).returncode == 0 and (tmp_path / "out/small/plain-seed1/again.json").stat().st_mtime_ns == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it starts its processes by fork")
def test_a_run_that_was_stopped_is_gone_on_with_and_not_measured_before(tmp_path):
    common = dict(data="shapes", limit=64, img_size=32, model="test_vit", epochs=300, batch_size=32, recovery_interval=0, device="cpu")
    (tmp_path / "small").mkdir()
    grid = tmp_path / "small/grid.yaml"
    grid.write_text(yaml.safe_dump(dict(common=common, arms=dict(plain=dict(regularizer="none")), seeds=[1])), encoding="utf-8")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump([dict(grid="small/grid.yaml", seconds=1)]), encoding="utf-8")
    words = ["plan.yaml", "-o", "out", "--results", "tars", "--jobs", "1", "--seconds", "300"]
    command = [sys.executable, str(ROOT / "benchmarks/grids_on_gpu.py"), *words]
    p = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    run, until = tmp_path / "out/small/plain-seed1", time.monotonic() + 200
    while len((run / "metrics.csv").read_text(encoding="utf-8").splitlines() if (run / "metrics.csv").exists() else ()) < 3:
        assert time.monotonic() < until and p.poll() is None
        time.sleep(.05)
    p.terminate()
    said, _ = p.communicate(timeout=100)
    before = (run / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert not (run / "evaluation.json").exists() and 3 <= len(before) < 300, said
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from grids_on_gpu import Job

    from spatial_entropy.training.comparing import Planned, planned, read_grid
    job = Job(planned(read_grid(grid), tmp_path / "out/small")[0], 0, None, {})
    assert isinstance(job.run, Planned) and not job.done()


def test_what_was_guessed_is_off_by_as_much_as_what_was_measured():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from grids_on_gpu import expected
    assert expected([60., 30.], [0., 0.]) == [60, 30] and expected([60., 30.], [180., 0.]) == [180, 90]
