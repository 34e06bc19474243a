"""Folders as people have them, and runs that go wrong."""
import json
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from probes import entropies
from runs import quick

import spatial_entropy as se
from spatial_entropy.commands import main
from spatial_entropy.training import jobs, loop
from spatial_entropy.training.evaluating import to_measure
from spatial_entropy.training.models import load_weights, start_model
from spatial_entropy.training.progress import RunProgress


def folder(root, **classes):
    "Pictures of one colour: folder(root, **{'train/cat': 5})."
    for name, n in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.new("RGB", (40, 30), (40 * i % 255, 90, 20)).save(root / name / f"{i}.jpg")
    return root


def test_train_and_val_folders_share_the_classes(tmp_path):
    root = folder(tmp_path, **{"train/b": 6, "train/a": 6, "train/c": 6, "val/c": 2, "val/a": 2})
    b = se.loaders(str(root), img_size=32, batch_size=4)
    source = b.val.dataset.source
    assert b.classes == ("a", "b", "c") and len(b.train.dataset) == 18 and len(b.val.dataset) == 4
    assert [Path(source.name(i)).parent.name for i in range(4)] == [b.classes[k] for k in source.labels]
    assert sorted(source.labels) == [0, 0, 2, 2]                             # c keeps its number although val has no b


def test_limit_is_balanced_and_the_split_depends_on_the_seed_alone(tmp_path):
    root = str(folder(tmp_path, a=20, b=20))
    one, two, other = (se.loaders(root, 32, 4, seed=s, limit=10) for s in (1, 1, 2))
    names = lambda part: [part.dataset.source.name(i) for i in range(len(part.dataset))]
    labels = one.train.dataset.source.labels
    assert labels.count(0) == labels.count(1) == 5 and len(one.val.dataset) == 8
    assert names(one.val) == names(two.val) != names(other.val)
    assert not set(names(one.train)) & set(names(one.val))


@pytest.mark.parametrize("asked,found", [("bilinear", "bilinear"), ("nearest", "nearest"), (None, "bicubic")])
def test_pictures_are_measured_at_the_size_of_training_by_the_same_way(asked, found):
    loaders = to_measure(None, jobs.TrainConfig(img_size=16, interpolation=asked), None, dict(mean=(.5,) * 3, std=(.5,) * 3))
    resizing = [t.interpolation.value for t in loaders.val.dataset.transform.transforms if hasattr(t, "interpolation")]
    assert resizing == [found]


def test_pictures_that_were_learned_from_are_never_measured_as_validation(tmp_path, capsys, quick_runs):
    "A picture more in a folder without parts, and the seed draws others: neither evaluate nor resume takes them."
    photos, tiny = folder(tmp_path / "photos", cat=12, dog=12), "--img-size 16 --model-kwargs patch_size=8 embed_dim=12 depth=1 num_heads=2"
    train = f"train --data {photos} --output {tmp_path / 'runs'} --epochs 1 --batch-size 8 --workers 0 --device cpu {tiny}"
    assert main([*train.split(), "--experiment", "first"]) == 0
    run = tmp_path / "runs/first"
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0 and main(["evaluate", str(run), "--split", "train"]) == 0
    assert main([*train.split(), "--seed", "43", "--initial-checkpoint", str(run), "--keep-skip"]) == 0
    assert "it has learned from some of what is validation here" in capsys.readouterr().out.replace("\n", " ")
    Image.new("RGB", (40, 30), (1, 2, 3)).save(photos / "cat/0a.jpg")
    for line in (["evaluate", str(run)], ["train", "--resume", str(run)]):
        assert main(line) == 2
        said = capsys.readouterr().err
        assert "its pictures are not those of the training" in said and "Traceback" not in said
    assert main(["evaluate", str(run), "--split", "all"]) == 0                 # asked for by name


@pytest.mark.parametrize("classes,said", [
    ({"train/a": 3, "train/b": 3}, "has train/ but no val/"),
    ({"train/a": 3, "train/b": 3, "val/x": 2}, "has classes that train/ has not: x"),
    ({"only": 9}, r"found 1 class \(only\); expected a subfolder for each"),
    ({"a": 1, "b": 0}, "found 1 class"),
])
def test_folder_mistakes(tmp_path, classes, said):
    with pytest.raises(ValueError, match=said):
        se.loaders(str(folder(tmp_path, **classes)), 32, 2)


@pytest.fixture
def quick_runs():
    with quick():
        yield


def test_keep_skip_leaves_a_stock_model(tmp_path, quick_runs):
    run = se.train(limit=32, epochs=1, output=str(tmp_path), experiment="x", keep_skip=True, model_kwargs=dict(depth=1), entropy_weight=0.)
    model, config, _ = se.load_run(run.folder)
    assert config.keep_skip and type(model.blocks[-1]) is timm.models.vision_transformer.Block
    assert all(p.requires_grad for p in model.parameters())


def test_the_regulariser_lowers_entropy_when_it_is_all_there_is():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=2)
    x = torch.tensor(se.shapes(32).images).permute(0, 3, 1, 2) / 255
    values = entropies(model, model.parameters(), x, 1e-3)
    assert values[-1] < .5 * values[0]


def test_a_nan_under_a_gradient_scaler_is_left_out_and_the_next_update_is_made(tmp_path, monkeypatch):
    "As in float16 on a GPU; the scaler is that of a CPU, which scales as well."
    model = dict(model="vit_tiny_patch16_224", model_kwargs=dict(patch_size=8, embed_dim=12, depth=1, num_heads=2))
    job = jobs.prepare(jobs.TrainConfig(img_size=16, batch_size=8, limit=16, workers=0, device="cpu", output=str(tmp_path), **model))
    job.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.)
    with job.states.ours():
        job.optimizer = AcceleratedOptimizer(job.optimizer.optimizer, device_placement=False, scaler=job.accelerator.scaler)
    weights, said = list(job.model.parameters()), []
    monkeypatch.setattr(type(job.accelerator), "mixed_precision", "fp16")
    job.accelerator.native_amp = True
    for value, changed in ((float("nan"), False), (1., True), (float("nan"), False), (1., True)):
        before = [w.detach().clone() for w in weights]
        loss = value * sum(w.square().sum() for w in weights if w.requires_grad)
        job.accelerator.backward(loss)
        loop._apply(job, [(loss.detach(), torch.ones(5))], SimpleNamespace(note=said.append))
        assert changed == any((a != b).any() for a, b in zip(before, weights))
        job.place.update += 1
    assert len(said) == 2 and "this update was left out (1 in a row" in said[1]
    assert job.accelerator.scaler.get_scale() == 1.                     # halved by each


def test_a_gradient_that_overflows_whatever_its_scale_ends_in_a_sentence(tmp_path, monkeypatch):
    "The scaler's own skips are not counted; once its scale is 1 the gradient itself is what is broken."
    model = dict(model="vit_tiny_patch16_224", model_kwargs=dict(patch_size=8, embed_dim=12, depth=1, num_heads=2))
    settings = dict(img_size=16, batch_size=8, limit=16, workers=0, device="cpu", max_skips=1, output=str(tmp_path), **model)
    job, said = jobs.prepare(jobs.TrainConfig(**settings)), []
    job.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.)
    with job.states.ours():
        job.optimizer = AcceleratedOptimizer(job.optimizer.optimizer, device_placement=False, scaler=job.accelerator.scaler)
    monkeypatch.setattr(type(job.accelerator), "mixed_precision", "fp16")
    job.accelerator.native_amp = True

    def update(value):
        loss = sum(w.square().sum() for w in job.model.parameters() if w.requires_grad)
        job.accelerator.backward(value * loss)
        loop._apply(job, [(loss.detach(), torch.ones(5))], SimpleNamespace(note=said.append))

    for scale in (4., 2.):
        assert job.accelerator.scaler.get_scale() == scale
        update(float("inf"))
    assert not said and job.place.skips == 0
    update(float("inf"))
    assert len(said) == 1 and "(with a finite loss); this update was left out (1 in a row, 1 allowed)" in said[0]
    with pytest.raises(FloatingPointError, match=r"2. time in a row; lower --lr, .* take --amp-dtype bfloat16"):
        update(float("inf"))


small = dict(img_size=16, batch_size=8, limit=16, workers=0, epochs=1, device="cpu", model="vit_tiny_patch16_224",
             model_kwargs=dict(patch_size=8, embed_dim=12, depth=1, num_heads=2))


def test_runs_of_one_process_keep_their_own_precision_and_accumulation(tmp_path, quick_runs):
    "Nor do they take, or change, that of someone's own Accelerator."
    before = {kind: dict(kind._shared_state) for kind in (PartialState, AcceleratorState)}
    first = jobs.prepare(jobs.TrainConfig(**small, amp_dtype="bfloat16", output=str(tmp_path)))
    jobs.prepare(jobs.TrainConfig(**{**small, "batch_size": 4}, grad_accum_steps=2, output=str(tmp_path)))
    assert first.accelerator.mixed_precision == "bf16" and first.accelerator.gradient_accumulation_steps == 1
    with first.autocast():
        assert torch.is_autocast_enabled("cpu")
    assert len(loop.fit(first)) == 1 and first.place.updates == 2
    assert before == {kind: dict(kind._shared_state) for kind in before}


def test_someones_own_accelerator_is_left_as_it_is(tmp_path, quick_runs):
    for kind in (PartialState, GradientState):
        kind._reset_state()
    AcceleratorState._reset_state(True)
    try:
        mine = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
        assert se.train(output=str(tmp_path), plot=False, **small).rows
        assert (mine.mixed_precision, mine.gradient_accumulation_steps) == ("bf16", 3)
        assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    finally:
        GradientState._reset_state()
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_trackers_are_closed_however_a_run_ends(tmp_path, quick_runs, monkeypatch, error):
    closed = []
    tracker = SimpleNamespace(finish=lambda: closed.append("closed"), log=lambda *a, **k: None)
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, *a: setattr(self, "trackers", [tracker]))
    job = jobs.prepare(jobs.TrainConfig(**small, trackers=["tensorboard"], output=str(tmp_path)))
    with patch.object(loop, "train_epoch", side_effect=error), pytest.raises(type(error)):
        loop.fit(job)
    assert closed == ["closed"]


def test_a_loss_that_is_no_number_ends_in_a_sentence(tmp_path, quick_runs, capsys):
    line = "train --limit 96 -b 8 --epochs 2 --lr 1e3 --opt sgd --warmup-epochs 0 --img-size 32 --model-kwargs depth=2 --output"
    code, said = main([*line.split(), str(tmp_path)]), capsys.readouterr().err
    assert code == 1 and "lower --lr, and look at the data" in said and "Traceback" not in said
    assert "go on with: spatial-entropy train --resume" in said


tiny = dict(limit=32, batch_size=8, epochs=2, img_size=32, model_kwargs=dict(depth=2, embed_dim=24, num_heads=2, patch_size=8), picture_interval=9, plot=False)


@pytest.mark.parametrize("settings", [
    dict(amp_dtype="bfloat16"), dict(compile="aot_eager", amp_dtype="bfloat16", grad_checkpointing=True, model_ema=True, model_ema_warmup=True,
                                   model_kwargs={**tiny["model_kwargs"], "depth": 1}),
    dict(channels_last=True, aug_repeats=3, smoothing=.1, opt="lamb"), dict(layer_decay=.7, sched_on_epochs=True, warmup_epochs=0, clip_grad=0., drop_path=.3),
    dict(interpolation="random", aa="augmix-m3-w2", fraction=.5, limit=None), dict(keep_skip=True, entropy_weight=0., max_skips=0),
    dict(mixup=.2, cutmix=.3, mixup_prob=.5, lr_base=1e-3, lr_base_size=16),
    dict(pooling="simpool", pooling_gamma=2., model_ema=True, amp_dtype="bfloat16", layer_decay=.8, entropy_weight=.1, drop_path=.2),
], ids=lambda s: " ".join(k for k in s if k != "model_kwargs"))
def test_every_setting_trains_stops_and_goes_on(tmp_path, settings, quick_runs):
    "In one go, and interrupted in the second epoch: the same weights."
    settings = {**tiny, **settings}
    if "fraction" in settings:
        settings |= dict(data=str(folder(tmp_path / "data", **{c: 40 for c in "ab"})), workers=0)
    run = se.train(output=str(tmp_path), experiment="whole", **settings)
    assert len(run.rows) == 2 and all(r["train_loss"] == r["train_loss"] for r in run.rows)
    calls, run_updates = [], json.loads((run.folder / "facts.json").read_text())["updates_per_epoch"]

    def update(self, images, **means):
        calls.append(images)
        if len(calls) == (run_updates + 1):
            signal.raise_signal(signal.SIGTERM)

    with patch.object(RunProgress, "update", update):
        stopped = se.train(output=str(tmp_path), experiment="stopped", **settings)
    assert stopped.stopped == "SIGTERM"
    se.resume(stopped.folder, plot=False)
    ours, theirs = (load_weights(f / "model.safetensors") for f in (stopped.folder, run.folder))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_teacher(tmp_path, quick_runs):
    teacher = se.train(output=str(tmp_path), experiment="teacher", **tiny)
    torch.save(timm.create_model("test_vit", num_classes=10).state_dict(), tmp_path / "teacher.pth")
    run = se.train(output=str(tmp_path), experiment="pupil", teacher="test_vit", teacher_checkpoint=str(tmp_path / "teacher.pth"), **tiny)
    assert run.rows[0]["train_loss"] != run.rows[0]["train_ce"] and run.rows[0]["train_loss"] != teacher.rows[0]["train_loss"]
    size = lambda r: (jobs.checkpoints(r.folder)[-1] / "model.safetensors").stat().st_size
    assert abs(size(run) - size(teacher)) < 1000                             # the teacher is not in the checkpoint


def test_a_run_with_an_average_is_judged_and_gone_on_with_by_it(tmp_path, quick_runs, capsys):
    run = se.train(output=str(tmp_path), experiment="ema", model_ema=True, model_ema_decay=.5, **tiny).folder
    step, judged = jobs.checkpoints(run)[-1], load_weights(run / "model.safetensors")
    classes = json.loads((run / "facts.json").read_text())["classes"]
    assert not all(torch.equal(v, judged[k]) for k, v in load_weights(step / "model.safetensors").items())

    def started(path):
        said = []
        settings = {k: v for k, v in tiny.items() if k != "plot"}
        found = start_model(jobs.TrainConfig(**settings, initial_checkpoint=str(path)), classes, said.append)
        return all(torch.equal(v, judged[k]) for k, v in found.state_dict().items()), said

    assert started(run) == started(run / "model.safetensors") == (True, [])
    for path in (step, step / "model.safetensors"):                          # these are not averaged, and that is said
        same, said = started(path)
        assert not same and "not their average" in said[0] and f"--initial-checkpoint {run} takes that" in said[0]
    for name in ("ema", "", "last"):
        with pytest.raises(ValueError, match="weights: got .*has an average, both are that"):
            se.evaluate(run, weights=name)
    for path in (step, run / "model.safetensors"):
        assert main(["evaluate", str(path)]) == 2 and f"it lies in the run {run}: name that" in capsys.readouterr().err


def test_the_folder_of_training_pictures_is_never_measured_as_validation(tmp_path, quick_runs, capsys):
    data = folder(tmp_path / "photos", **{"train/a": 20, "train/b": 20, "val/a": 4, "val/b": 4})
    others = folder(tmp_path / "others", **{"train/a": 10, "train/b": 10})
    settings = {k: v for k, v in small.items() if k != "limit"}
    run = se.train(output=str(tmp_path), experiment="run", plot=False, data=str(data), **settings).folder
    for name in ("train", "train/../train"):
        with pytest.raises(ValueError, match="the run has learned from these, the training pictures.*leave data out.*--split train"):
            se.evaluate(run, data=str(data / name), split="val")
        for split in (None, "train", "all"):
            assert "learned from these, the training pictures" in se.evaluate(run, data=str(data / name), split=split)["notes"][0]
    for name, split in ((None, None), (data, "val"), (data / "val", None), (others / "train", None)):
        assert not se.evaluate(run, data=name and str(name), split=split)["notes"]
    assert main(["evaluate", str(run), "--data", str(others / "train"), "--split", "val"]) == 0
    assert "has no parts; 4 of its 20 pictures" in " ".join(capsys.readouterr().out.split())


def test_trackers_get_the_metrics(tmp_path, quick_runs):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = se.train(output=str(tmp_path), experiment="logged", trackers=["tensorboard"], **tiny)
    logs = [EventAccumulator(str(p.parent)) for p in run.folder.rglob("events.out.tfevents.*")]
    [log.Reload() for log in logs]
    log = next(log for log in logs if "val_top1" in log.Tags()["scalars"])
    assert [round(e.value, 4) for e in log.Scalars("val_top1")] == [round(r["val_top1"], 4) for r in run.rows]
