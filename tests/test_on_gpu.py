"""benchmarks/on_gpu.py without a GPU: its parts, small, on the CPU; and that nothing that one of them does takes the others with it."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import create_autospec

import on_gpu
import pytest

ROOT = Path(__file__).resolve().parent.parent
PART = """
import json, os, signal, sys, time
part, folder, share = sys.argv[1], sys.argv[2], sys.argv[4].split("/")[0]
def write(**facts): json.dump(dict(part=part, seconds=1, **facts), open(f"{folder}/{part}.{share}.json", "w"))
if "--wait" in sys.argv:
    open(f"{folder}/{part}.ready", "w").close()
    if part == "benchmark": os.remove(f"{folder}/{part}.ready"); time.sleep(600)
    sys.stdin.readline()
if part == "values": write(cases=10, worst=dict(entropy=float(share)), failing=[dict(shape="5x7", error="off")] if share == "2" else [])
if part == "behaviour": os.kill(os.getpid(), signal.SIGSEGV)
if part == "taps": write(models=3); time.sleep(600 if share == "1" else 0)
if part == "growth": write(seen=sorted(os.listdir(folder)))
if part == "runs": write(same_twice=True)
if part == "step": write(failed="Traceback: no memory")
if part == "training": time.sleep(600)
if part == "tune": write(rows=[1])
"""


def read(folder):
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("*.json")}


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups on this system")
def test_a_part_that_dies_hangs_or_fails_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    script, folder, began = tmp_path / "parts.py", tmp_path / "out", time.monotonic()
    script.write_text(PART, encoding="utf-8")
    monkeypatch.setattr(on_gpu, "PARTS", script)
    monkeypatch.setattr(on_gpu, "LEAST", 2)
    monkeypatch.setattr(on_gpu, "TIMED", dict(growth=20, benchmark=1, step=20, runs=20, tune=20, training=60))
    assert on_gpu.main(["-o", str(folder), "--budget", "14"]) == 1
    said, found = capsys.readouterr().out, read(folder)
    assert time.monotonic() - began < 25
    assert found.keys() == {"values", "behaviour", "taps", "growth", "benchmark", "step", "runs", "training", "tune"}
    assert found["values"]["cases"] == 60 and found["values"]["worst"]["entropy"] == 5 and len(found["values"]["failing"]) == 1
    assert "code -11" in found["behaviour"]["failed"] and "no memory" in found["step"]["failed"]
    assert found["taps"]["models"] == 18 and "stopped" in found["taps"]["left out"]
    assert "values.json" in found["growth"]["seen"], "what is timed begins when the checks are over"
    assert "stopped" in found["benchmark"]["left out"] and "stopped" in found["training"]["left out"] and found["tune"]["rows"] == [1]
    assert "failed: values, behaviour, taps (not finished), step" in said, said


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups on this system")
def test_what_does_not_fit_into_the_budget_is_left_out_in_a_file(tmp_path, monkeypatch, capsys):
    script = tmp_path / "parts.py"
    script.write_text(PART.replace('"training": time.sleep(600)', '"training": write()'), encoding="utf-8")
    monkeypatch.setattr(on_gpu, "PARTS", script)
    skipped = ["values", "behaviour", "taps", "growth", "step", "runs", "tune"]
    assert on_gpu.main(["-o", str(tmp_path / "out"), "--budget", "9", "--skip", *skipped]) == 0
    found = read(tmp_path / "out")
    assert "were left" in found["training"]["left out"] and found.keys() == {"benchmark", "training"}


def test_without_a_gpu_it_says_so(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    skipped = [p for p in (*on_gpu.CHECKS, *on_gpu.TIMED) if p != "behaviour"]
    assert on_gpu.main(["-o", str(tmp_path), "--skip", *skipped]) == 1
    assert "no CUDA device" in read(tmp_path)["behaviour"]["failed"]


def run(code, tmp_path, **env):
    path = os.pathsep.join(str(ROOT / p) for p in (".", "benchmarks", "tests"))
    done = subprocess.run([sys.executable, *code, str(tmp_path)], env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, encoding="utf-8",
                          errors="replace", timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_its_parts_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    run(["tests/on_gpu_rehearsed.py"], tmp_path)


def test_every_part_is_called_with_what_it_takes(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    import gpu_parts
    called = []
    for name in ("check_values", "check_taps", "check_behaviour", "compile_variants", *gpu_parts.TIMED):
        real = getattr(gpu_parts, name)
        spec = create_autospec(real, side_effect=lambda *a, name=name, **k: called.append((name, k.get("share", a[1:2]))) or {})
        monkeypatch.setattr(gpu_parts, name, spec)
        for table in (gpu_parts.CHECKS, gpu_parts.TIMED):
            for part in [part for part, f in table.items() if f is real]:
                monkeypatch.setitem(table, part, spec)
    for part in (*gpu_parts.CHECKS, *gpu_parts.TIMED, "compile"):
        monkeypatch.setattr(sys, "argv", ["gpu_parts.py", part, str(tmp_path), "--share", "0/1", "--device", "cpu"])
        assert gpu_parts.main() == 0, part
    assert len(called) == 10 and {p.name for p in tmp_path.iterdir()} == {f"{p}.0.json" for p in (*gpu_parts.CHECKS, *gpu_parts.TIMED)}


TAPS = """
import sys, gpu_parts as g, zoo
class Broken:
    name, sizes = "broken", ((32, 32),)
    def make(self, size): raise ValueError("no such model\\nat all")
zoo.TIMM.insert(0, Broken())
names = ["broken", "vit_tiny_patch16_224", "twins_svt_small", "swin_tiny_patch4_window7_224"]
found = g.check_taps(lambda facts: None, device="cpu", models=names, compiled=())
assert found["models"] == 4 and found["failing"] == [dict(model="broken", error="ValueError: no such model")], found
assert found["worst"]["float32"] < 1e-3, found
"""


def test_a_model_that_fails_is_named_and_others_go_on(tmp_path):
    pytest.importorskip("triton")
    run(["-c", TAPS], tmp_path)
