"""The benchmarks that are run from a checkout: what is wrong is one sentence, what is right is written."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import loss
import pytest
import training

LOSS = [
    "--kinds waves", "--peers scikit", "--shapes 14", "--authors-code nowhere", "--device tpu9", "--dtype int8",
    "--repeats 0", "--threads 0", "--output chelsea.png/results", "--output=", "--authors_code nowhere"]
TRAINING = [
    "--timm-train nowhere", "--rounds 0", "--model=", "--timm_train nowhere"]


@pytest.mark.parametrize("script, line", [*((loss, w) for w in LOSS), *((training, w) for w in TRAINING)])
def test_a_mistake_is_one_sentence_and_writes_nothing(script, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chelsea.png").write_text("")
    try:
        code = script.main(line.split())
    except SystemExit as e:  # of argparse
        code = e.code
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and "Traceback" not in said, said
    assert [p.name for p in tmp_path.iterdir()] == ["chelsea.png"]


def test_a_very_small_benchmark_writes_its_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loss.main("--quick --shapes 2x2x8 --peers scipy --repeats 1 --budget 0".split()) == 0
    assert sorted(p.name for p in (tmp_path / "benchmark-results").iterdir()) == ["benchmark.json", "benchmark.png"]


FORK = """
import loss, numba, threading, torch
def measure():
    loss.give_back_at_once()
    return int(torch.ones(2, 1 << 20).sum()) + torch.get_num_threads()
torch.set_num_threads(2); torch.ones(2, 1 << 20).sum()
print(loss.in_fork(measure))
loss._set_threads(1)
print(torch.get_num_threads())
lock = threading.Lock(); lock.acquire()              # a lock of another thread of the parent stays closed in a copy
print(loss.in_fork(lock.acquire, seconds=.2))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="no numba")
def test_a_fork_has_one_thread_and_does_not_wait_for_its_parents():
    env = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(loss.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", FORK], env=env, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout.split()) == (0, [str(2**21 + 1), "1", "None"]), done.stderr


def test_what_a_process_of_its_own_says():
    assert loss.in_python("import json; json.dump([*json.load(sys.stdin), 'ours' in __import__('loss').CONTENDERS], sys.stdout)", [1]) == ([1, True], None)
    assert loss.in_python("raise SystemExit('no memory left')") == (None, "no memory left")
    assert loss.in_python("import os; os._exit(3)") == (None, "exit code 3")
