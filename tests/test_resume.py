"""A run that is killed, however often and whenever, ends with the bits of the run that was not."""
import os
import random
import signal
import time

import kills
import pytest
from accelerate import PartialState
from runs import assert_same, everything, pair, start, state, whole

import spatial_entropy as se
from spatial_entropy import jobs


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    began = time.perf_counter()
    run = whole(tmp_path_factory.mktemp("whole"))
    return state(run), time.perf_counter() - began


def test_killed_at_ten_random_moments_also_while_writing(tmp_path):
    settings = {**everything, "epochs": 4}
    began = time.perf_counter()
    truth = state(whole(tmp_path / "whole", settings))
    seconds, draw, kills = time.perf_counter() - began, random.Random(0), []
    points = [("sync", draw.randint(1, 25)) for _ in range(4)] + [("state", 1), ("prune", 2)] + [None] * 100
    for point in points:
        child = start(tmp_path, settings, point=point)
        if point is None:                                    # at any moment, from the first import of the run to its end
            child.join(draw.uniform(.05, .2) * seconds)
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += [point] if child.exitcode == -signal.SIGKILL else []
        if len(kills) == 10 or child.exitcode == 0:
            break
    assert len(kills) == 10, kills                           # the run did not end before
    run = whole(tmp_path, settings)
    assert_same(state(run), truth)
    assert not list((run / "checkpoints").glob(".*"))         # nothing half written stays


def test_every_file_is_that_of_the_uninterrupted_run(tmp_path):
    """Killed between any two writes and at random, with loading processes, Mixup, average and accumulation.

    Only the two times in metrics.csv (and in the place, where they come from) may differ. SPATIAL_ENTROPY_KILLS=100 kills a hundred times.
    """
    config = kills.settings(tmp_path)
    began = time.perf_counter()
    truth, writes = kills.whole(tmp_path / "whole", config)
    seconds = time.perf_counter() - began
    assert {"best.safetensors", "model.safetensors", "metrics.csv", "evaluation.json", "attention.gif", "pictures/before.safetensors"} <= truth.keys()
    assert truth["best.safetensors"] != truth["model.safetensors"] and writes > 150
    moments = kills.moments(int(os.environ.get("SPATIAL_ENTROPY_KILLS", 8)), writes, seconds)
    killed, wrong = 0, {}
    for k, moment in enumerate(moments):
        was, found = kills.kill_and_go_on(tmp_path / str(k), config, moment, truth)
        killed += was
        wrong |= {str(moment): found} if found else {}
    assert not wrong and killed >= 2 * len(moments) // 3, (killed, wrong)


def test_every_update_killed_once(tmp_path, uninterrupted):
    "Ten kills, each in a later checkpoint than the one before: after the bytes, before the name."
    for k in range(10):
        child = start(tmp_path, settings=everything, point=("state", 1 if k == 0 else 2))
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
    assert k >= 6
    assert_same(state(whole(tmp_path)), uninterrupted[0])


def test_sigterm_and_sigint_save_and_go_on(tmp_path, uninterrupted):
    truth, seconds = uninterrupted
    codes, said = [], tmp_path / "said"
    said.touch()
    for k in range(5):
        began = len(said.read_text().splitlines())
        child = start(tmp_path, settings={**everything, "recovery_interval": 0}, said=said)
        while child.is_alive() and not (len(said.read_text().splitlines()) > began or (tmp_path / "run" / "pictures" / "epoch-0000.png").exists() and not k):
            time.sleep(.01)                                  # it has begun, or says that it goes on
        time.sleep(.1 + seconds * .05)
        if child.is_alive():
            os.kill(child.pid, (signal.SIGTERM, signal.SIGINT)[k % 2])
        child.join()
        codes.append(child.exitcode)
    assert 3 in codes and set(codes) <= {0, 3}, (codes, said.read_text())
    assert "saved; go on with resume(" in said.read_text()
    ours = state(whole(tmp_path))
    assert_same(ours, truth)


def test_loading_processes_do_not_matter(tmp_path, uninterrupted):
    "Killed with two of them, gone on with none."
    child = start(tmp_path, settings={**everything, "workers": 2}, point=("state", 5))
    child.join()
    assert child.exitcode == -signal.SIGKILL and len(jobs.checkpoints(tmp_path / "run")) == 2
    for c in (tmp_path / "run").glob("config.yaml"):
        c.write_text(c.read_text().replace("workers: 2", "workers: 0"))
    assert_same(state(whole(tmp_path)), uninterrupted[0])


def test_two_processes_one_of_them_killed(tmp_path):
    settings = {**everything, "grad_accum_steps": 1}
    PartialState(cpu=True)                                   # accelerate has been used here before, by one process alone
    children = pair(tmp_path / "whole", settings)
    [c.join() for c in children]
    assert [c.exitcode for c in children] == [0, 0]
    said = tmp_path / "rank0", tmp_path / "rank1"
    for victim, point in [(1, ("write", 2)), (0, ("state", 2)), (1, ("write", 2)), (0, ("sync", 30)), (1, ("write", 2))]:
        children = pair(tmp_path / "killed", settings, [point if r == victim else None for r in range(2)], said)
        [c.join(90) for c in children]
        assert children[victim].exitcode == -signal.SIGKILL and children[1 - victim].exitcode == 1       # and does not wait for ever
    children = pair(tmp_path / "killed", settings)
    [c.join() for c in children]
    assert [c.exitcode for c in children] == [0, 0]
    assert_same(state(tmp_path / "killed" / "run"), state(tmp_path / "whole" / "run"))
    assert "another process of this run ended" in said[0].read_text()


def test_two_processes_asked_to_stop(tmp_path, uninterrupted):
    "Only one of them is asked; both save at the same update. Then one process goes on alone, with twice the accumulation."
    settings = {**everything, "grad_accum_steps": 1}
    children = pair(tmp_path, settings)
    while all(c.is_alive() for c in children) and not (tmp_path / "run" / "pictures" / "epoch-0000.png").exists():
        time.sleep(.01)
    os.kill(children[1].pid, signal.SIGTERM)
    [c.join(90) for c in children]
    assert [c.exitcode for c in children] == [3, 3]
    with pytest.raises(ValueError, match=r"makes an update from 16 pictures; here it would be 8 \(1 process\(es\)\): start as many as before \(2\)"):
        se.resume(tmp_path / "run")
