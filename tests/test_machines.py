"""Machines that are not this one: what cannot work is said before a run begins, and what does not matter does not stop it."""
import contextlib
import io
import random
from unittest.mock import patch

import numpy as np
import pytest
import torch

from spatial_entropy import jobs
from spatial_entropy.commands import main
from spatial_entropy.config import TrainConfig
from spatial_entropy.training import prepare

tiny = ["depth=1", "embed_dim=24", "num_heads=2", "patch_size=16"]
train = ["train", "--img-size", "64", "--limit", "32", "-b", "8", "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu"]


def typed(*words):
    "Exit code and what is said on stderr, of a command in this process."
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = main([str(w) for w in words])
    return code, said.getvalue()


def one_sentence(said):
    return said.count("\n") == 1 and "Traceback" not in said


# ---- what a model, an optimiser or a compiler cannot do is found before anything is written

unfit = {
    "in_chans=1": "cannot be trained on 2 picture(s) of 3×64×64", "patch_drop_rate=0.5": "patches were dropped",
    "num_classes=2": "got num_classes, which is set elsewhere", "img_size=32": "got img_size, which is set elsewhere",
    "pretrained=true": "got pretrained, which is set elsewhere", "global_pool=": "gives (2, 17, 10), expected scores (2, 10)",
    "num_heads=-2": "cannot be trained", "patch_size=0": "cannot be built", "device=meta": "got device, which is set elsewhere",
    "features_only=true": "got features_only, which is set elsewhere", "drop_rate=2": "cannot be built", "depth=[1]": "cannot be built"}


@pytest.mark.parametrize("argument", unfit)
def test_an_argument_that_no_run_survives_is_named_before_anything_is_written(tmp_path, argument):
    code, said = typed(*train, "--output", tmp_path, "--model-kwargs", *(t for t in tiny if t.split("=")[0] not in argument), argument)
    assert code == 2 and unfit[argument] in said and one_sentence(said), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, expected", [
    (["--opt", "adahessian"], "opt: got 'adahessian', which cannot train here"),
    (["--compile", "tvm"], "compile: got 'tvm', which does not work here"),
    (["--model", "convit_tiny", "--grad-checkpointing", "--keep-skip"], "grad_checkpointing: convit_tiny does not offer it")])
def test_a_tool_that_does_not_work_here_is_named_before_anything_is_written(tmp_path, words, expected):
    code, said = typed(*train, "--output", tmp_path, *([] if "--model" in words else ["--model-kwargs", *tiny]), *words)
    assert code == 2 and expected in said and one_sentence(said), said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [
    dict(model_kwargs=dict(depth=2, embed_dim=24, num_heads=2, patch_size=8), drop_path=.2, amp_dtype="bfloat16", model_ema=True),
    dict(model="levit_128s", img_size=224, keep_skip=True, compile="eager")], ids=["dropout, bfloat16, average", "batch norm"])
def test_the_trial_changes_no_bit_of_a_run(tmp_path, settings):
    def prepared(name):
        job = prepare(TrainConfig(**{**dict(limit=32, batch_size=8, epochs=1, warmup_epochs=0, output=str(tmp_path), device="cpu"),
                                     **settings, "experiment": name}), say=lambda said: None)
        job.tap.close()
        state = {**job.model.state_dict(), **(job.ema.state_dict() if job.ema else {})}
        return {k: v.clone() for k, v in state.items()}, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    weights, *drawn = prepared("tried")
    with patch.object(jobs, "try_forward", lambda *a: None), patch.object(jobs, "_try_tools", lambda *a: None):
        others, *theirs = prepared("untried")
    assert weights.keys() == others.keys() and all(torch.equal(weights[k], others[k]) for k in weights)
    assert torch.equal(drawn[0], theirs[0]) and drawn[1:] == theirs[1:]
