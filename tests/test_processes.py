"""Several processes: torchrun, accelerate's notebook_launcher, and the same weights as one process that accumulates."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import torch
from accelerate import notebook_launcher
from accelerate.state import AcceleratorState, PartialState
from runs import assert_same, everything, exit_codes, free_port, pair, processes, quick, slow, state, until, whole

from spatial_entropy.training import jobs
from spatial_entropy.training.config import TrainConfig
from spatial_entropy.training.loop import resume, train
from spatial_entropy.training.models import load_weights

here = Path(sys.executable).parent
alone, two = {**everything, "grad_accum_steps": 2}, {**everything, "grad_accum_steps": 1}
# Sums of four gradients are rounded in another order than two sums of two. AdamW divides noise by noise where the gradient is zero but for rounding
# (the bias of the keys, which softmax does not see), and moves such a weight by the learning rate in any direction; SGD does not.
more = dict(opt="momentum", lr=.05)
accumulated = [(alone, two), ({**everything, **more, "grad_accum_steps": 4}, {**everything, **more, "grad_accum_steps": 2})]


def close(a, b):
    for k, v in a["trained"].items():
        torch.testing.assert_close(v, b["trained"][k], atol=1e-6, rtol=0, msg=lambda said, k=k: f"{k}: {said}")


@pytest.mark.parametrize("alone, two", accumulated, ids=["AdamW 1 x 2 = 2 x 1", "SGD 1 x 4 = 2 x 2"])
def test_two_processes_equal_one_with_twice_the_accumulation(tmp_path, alone, two):
    "Crops, RandAugment, erasing, Mixup, CutMix, stochastic depth, average, clipping: all the same draws."
    children = pair(tmp_path / "two", two)
    assert exit_codes(*children) == [0, 0]
    ours, theirs = state(tmp_path / "two" / "run"), state(whole(tmp_path / "one", alone))
    close(ours, theirs)
    assert ours["ours"]["place"]["rows"][0].keys() == theirs["ours"]["place"]["rows"][0].keys()
    for a, b in zip(ours["ours"]["place"]["rows"], theirs["ours"]["place"]["rows"]):
        assert all(abs(a[k] - b[k]) < 1e-4 for k in a), (a, b)


def go_on(run, accumulate):
    torch.set_num_threads(1)
    with quick():
        resume(run, plot=False, grad_accum_steps=accumulate)


def test_one_process_goes_on_for_two(tmp_path):
    "Two are stopped in the middle; one of them, with twice the accumulation, ends with what one alone would have."
    children = pair(tmp_path, {**two, "recovery_interval": 0}, hook=slow)
    until((tmp_path / "run" / "pictures" / "epoch-0000.png").exists, *children)
    os.kill(children[1].pid, signal.SIGTERM)
    assert exit_codes(*children) == [3, 3] and len(jobs.checkpoints(tmp_path / "run")) == 1
    child = processes.Process(target=go_on, args=(tmp_path / "run", 2))
    child.start()
    assert exit_codes(child) == [0]
    close(state(tmp_path / "run"), state(whole(tmp_path / "one", alone)))


small = ("train --limit 32 -b 8 --epochs 1 --img-size 32 --model-kwargs depth=1 embed_dim=24 num_heads=2 patch_size=16 --mixup .8 "
         "--picture-interval 9 --experiment run").split()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return kills.pictures(tmp_path_factory.mktemp("photos") / "data")


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory, photos):
    "What two processes under torchrun said, and the folder they wrote to."
    folder = tmp_path_factory.mktemp("torchrun")
    command = [here / "torchrun", "--nproc-per-node", "2", "--no-python", here / "spatial-entropy", *small, "--data", photos, "--output", folder]
    said = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    return said, folder


def test_torchrun(torchrun):
    said, folder = torchrun
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("run folder: ") == said.stdout.count("as JSON: ") == 1 and "2 × cpu" in said.stdout
    assert [p.name for p in folder.iterdir()] == ["run"]
    assert len(list((jobs.checkpoints(folder / "run")[-1]).glob("random_states_*.pkl"))) == 2


def in_a_notebook(output, data, port):
    "As a cell of a fresh kernel would; accelerate may have been used here before, by one process alone."
    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    torch.set_num_threads(1)
    config = TrainConfig(data=str(data), limit=32, batch_size=8, epochs=1, img_size=32, mixup=.8, picture_interval=9, experiment="run",
                         output=str(output), model_kwargs=dict(depth=1, embed_dim=24, num_heads=2, patch_size=16))
    with quick():
        notebook_launcher(train, (config,), num_processes=2, use_port=str(port))


def test_notebook_launcher_gives_the_weights_of_torchrun(tmp_path, photos, torchrun):
    child = processes.Process(target=in_a_notebook, args=(tmp_path, photos, free_port()))
    child.start()
    assert exit_codes(child) == [0]
    assert len(list((jobs.checkpoints(tmp_path / "run")[-1]).glob("random_states_*.pkl"))) == 2
    assert_same(*(load_weights(p / "run" / "model.safetensors") for p in (tmp_path, torchrun[1])))
