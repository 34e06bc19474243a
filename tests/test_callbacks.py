"""The regulariser in other people's loops: each framework for two steps or more, and what a loop can do to it."""
import copy
import math
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time

import pytest
import timm
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import spatial_entropy as se
from spatial_entropy.loops.regularizer import SpatialEntropyRegularizer

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)


def make(**more):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **more})


def pictures(n=4):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def batches(n=8, size=4):
    return DataLoader(TensorDataset(pictures(n), torch.arange(n) % 5), batch_size=size)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def is_stock(model):
    return not any("_tap_sites" in vars(m) for m in model.modules())


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def in_processes(work, n, *args, seconds=300):
    "work(rank, *args) in n processes. A fork spares them their imports; autograd forbids it beside a GPU."
    how, end = "spawn" if torch.cuda.is_available() else "fork", time.monotonic() + seconds
    running = torch.multiprocessing.start_processes(work, args, nprocs=n, join=False, start_method=how)
    while not running.join(5):
        if time.monotonic() > end:
            for process in running.processes:
                process.kill()
            raise AssertionError(f"{n} processes did not end in {seconds} s, and were killed")


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- by itself ----


def test_import_costs_no_framework():
    code = ("import sys, spatial_entropy.loops.regularizer; "
            "print(*{'lightning', 'pytorch_lightning', 'fastai', 'torchmetrics', 'transformers'} & set(sys.modules))")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == ""


@pytest.mark.parametrize("block", [-1, 0, [0, 1], "all"])
def test_value_and_gradient_are_those_of_the_loss(block):
    model, x = make().double(), pictures().double()
    reg = SpatialEntropyRegularizer(model, weight=.3, block=block)
    model(x)
    got = reg()
    got.backward()
    found = gradient(model)
    reg.close()
    model.zero_grad()
    with se.AttentionTap(model, block=block) as tap:
        model(x)
    maps = tap.maps() if isinstance(tap.maps(), dict) else {0: tap.maps()}
    want = .3 * sum(se.spatial_entropy(m).mean() for m in maps.values()) / len(maps)
    want.backward()
    assert_close(got, want, rtol=1e-12, atol=0)
    assert_close(found, gradient(model), rtol=1e-9, atol=1e-12)


def test_schedule_is_the_papers_or_ones_own():
    model = make()
    reg = SpatialEntropyRegularizer(model, weight=.02, epochs=30, warmup=6)
    for epoch in (0, 2.5, 6, 20, 30, 30 + 1e-9):
        reg.step(epoch)
        assert reg.weight == pytest.approx(se.entropy_weight(epoch, 30, .02, 6), abs=1e-12)
    with pytest.warns(UserWarning, match=r"epoch: got 31, expected at most epochs=30.*with the epochs of the whole run") as warned:
        reg.step(31)
    reg.step(32)                                                         # said once
    assert len(warned) == 1 and warned[0].filename == __file__ and reg.weight == 0 and copy.deepcopy(reg).step(40) is None
    reg.close()
    reg = SpatialEntropyRegularizer(model, weight=lambda done: done / 10, epochs=4)
    reg.step(3)
    assert reg.weight == .075
    with pytest.raises(ValueError, match="epoch: got -1"):
        reg.step(-1)
    reg.close()
    for epochs, peak in ((200, 10), (100, 10), (20, 2), (3, .3)):        # a tenth, at most ten
        reg = SpatialEntropyRegularizer(model, epochs=epochs)
        reg.step(peak)
        assert reg.weight == .01
        reg.step(peak / 2)
        assert reg.weight == pytest.approx(.005)
        reg.close()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_gradient_accumulation(parts):
    model, x, y = make(), pictures(), torch.arange(4)
    reg = SpatialEntropyRegularizer(model, weight=.5)
    for xs, ys in zip(x.chunk(parts), y.chunk(parts)):
        ((F.cross_entropy(model(xs), ys) + reg()) / parts).backward()
    found = gradient(model)
    model.zero_grad()
    loss = F.cross_entropy(model(x), y) + reg()
    loss.backward()
    assert difference(found, gradient(model)) < 1e-5
    reg.close()


def test_a_weight_of_zero_computes_no_gradient_and_still_measures():
    model, x = make(), pictures()
    reg = SpatialEntropyRegularizer(model, epochs=10)
    reg.step(0)
    model(x)
    term = reg()
    assert term == 0 and not term.requires_grad and reg.logs()["entropy"] > 0
    reg.close()


def test_no_number_is_read_in_a_step(monkeypatch):
    model, x = make(), pictures()
    reg = SpatialEntropyRegularizer(model)
    model(x)

    def refuse(*_):
        raise AssertionError("a tensor was read")

    for name in ("item", "tolist", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    reg().backward()
    monkeypatch.undo()
    assert reg.logs()["entropy"] > 0
    reg.close()


def test_logs_are_means_between_readings():
    model = make()
    reg, seen = SpatialEntropyRegularizer(model), []
    assert reg.logs()["entropy"] != reg.logs()["entropy"]                # NaN: nothing was measured
    for x in pictures(6).split(2):
        model(x)
        reg()
        seen.append(reg.entropy.item())
    assert reg.logs()["entropy"] == pytest.approx(sum(seen) / 3, rel=1e-5) and reg.logs() == reg.logs()
    model(pictures())
    reg()
    assert reg.logs()["entropy"] == pytest.approx(reg.entropy.item())
    reg.close()
    assert reg.logs()["entropy"] > 0


@pytest.mark.filterwarnings("ignore:spatial_entropy. got maps with NaN")
def test_broken_maps_are_counted_and_harm_nothing():
    model, x = make(), pictures()
    x[1] = torch.nan
    reg = SpatialEntropyRegularizer(model, weight=1.)
    model(x)
    term = reg()
    model.zero_grad()
    assert term.isfinite() and reg.logs()["maps_left_out"] == 3 and reg.state_dict()["left_out"] == 3
    reg.close()


def test_errors_of_the_order_of_things():
    model, x = make(), pictures()
    reg = SpatialEntropyRegularizer(model, epochs=10)
    reg.step(3)
    with pytest.raises(RuntimeError, match="call the model on a batch before reg"):
        reg()
    model(x)
    reg()
    with pytest.raises(RuntimeError, match="used already"):
        reg()
    with pytest.raises(Exception), torch.no_grad():
        model(x[..., :30])                                              # a pass that fails leaves nothing to use
    with pytest.raises(RuntimeError, match="call the model on a batch"):
        reg()
    reg.close()
    reg.close()
    with pytest.raises(RuntimeError, match="closed"):
        reg()
    reg = SpatialEntropyRegularizer(model, epochs=10)
    model(x)
    with pytest.raises(RuntimeError, match="step was not called"):
        reg()
    reg.step(3)
    assert reg().requires_grad                                          # the error cost no map
    reg.close()
    assert is_stock(model)


@pytest.mark.parametrize("state,said", [
    ({"epoch": 3}, r"got keys \['epoch'\]"), (dict(spatial_entropy_regularizer=9), "got version 9"), ([1], "got list"), ({}, r"got keys \[\]"),
])
def test_a_foreign_state_is_refused_whole(state, said):
    with SpatialEntropyRegularizer(make(), epochs=10) as reg:
        reg.step(4)
        with pytest.raises(ValueError, match=said):
            reg.load_state_dict(state)
        assert reg.epoch == 4


@pytest.mark.parametrize("arguments,error,said", [
    (dict(weight=-.1), ValueError, "weight: got -0.1"), (dict(weight=float("nan")), ValueError, "weight: got nan"),
    (dict(epochs=0), ValueError, "epochs: got 0"), (dict(epochs=5, warmup=9), ValueError, "warmup: got 9"),
    (dict(weight="0.03"), TypeError, "weight: got '0.03', a str; expected a number of at least 0"), (dict(weight=True), TypeError, "weight: got True, a bool"),
    (dict(epochs="20"), TypeError, "epochs: got '20', a str"), (dict(epochs=20, warmup="2"), TypeError, "warmup: got '2', a str"),
    (dict(block=[0, 0]), ValueError, "names a block twice"), (dict(query="head"), ValueError, "query: got 'head'"),
])
def test_refused_settings_leave_the_model_alone(arguments, error, said):
    model = make()
    with pytest.raises(error, match=said):
        SpatialEntropyRegularizer(model, drop_skip=True, **arguments)
    assert is_stock(model) and all(p.requires_grad for p in model.parameters())
    SpatialEntropyRegularizer(model).close()


def test_a_regulariser_and_a_tap_each_say_what_its_own_user_has_to_do():
    model = make()
    with SpatialEntropyRegularizer(model) as reg, se.AttentionTap(model) as tap:
        with pytest.raises(RuntimeError, match=r"no map was recorded: call the model on a batch before reg\(\)"):
            reg()
        with pytest.raises(RuntimeError, match="no map was recorded: run the model on a batch inside"):
            tap.maps()


def test_models_without_a_map_are_refused():
    with pytest.raises(se.UnsupportedModel, match="convolutional"):
        SpatialEntropyRegularizer(timm.create_model("resnet18"))
    with pytest.raises(se.UnsupportedModel, match="several vision models"):
        SpatialEntropyRegularizer(nn.ModuleDict(dict(student=make(), teacher=make())))


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.vit = make()
        self.reg = SpatialEntropyRegularizer(self.vit)

    def forward(self, x):
        return self.vit(x)


def test_a_module_that_holds_it_registers_nothing_and_its_copies_are_stock():
    holder, x = Holder(), pictures()
    holder(x)
    holder.reg()
    assert not [n for n in [*holder.state_dict(), *dict(holder.named_modules())] if "reg" in n]
    for twin in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder)), timm.utils.ModelEmaV3(holder).module):
        assert is_stock(twin)
        assert_close(twin.eval()(x), holder.eval()(x))
        with pytest.raises(RuntimeError, match="closed, or a copy"):
            twin.reg()
    holder.reg.close()


def test_the_surgery_outlives_it():
    model, x = make(), pictures()
    stock = model.eval()(x)
    with SpatialEntropyRegularizer(model, drop_skip=True) as reg:
        cut = model(x)
        reg()
    assert is_stock(model) and torch.equal(model(x), cut) and not torch.allclose(cut, stock)
    reg.surgery.undo()
    assert torch.equal(model(x), stock)


def test_compiled_autocast_and_checkpointed():
    x, grads = pictures(), []
    for kind in ("plain", "compiled", "checkpointed"):
        torch._dynamo.reset()
        model = make().train()
        model.set_grad_checkpointing(kind == "checkpointed")
        reg = SpatialEntropyRegularizer(model, weight=1.)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if kind == "compiled" else model
        for _ in range(2):
            model.zero_grad()
            (run(x).square().mean() + reg()).backward()
        grads.append(gradient(model))
        reg.close()
    assert max(difference(g, grads[0]) for g in grads) < 1e-4
    model = make()
    with SpatialEntropyRegularizer(model, weight=1.) as reg:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean() + reg()
        assert loss.dtype == torch.float32
        loss.backward()
    assert gradient(model).isfinite().all()


def _ddp_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = make()
    reg = SpatialEntropyRegularizer(model, weight=.5, epochs=2, warmup=1, drop_skip=True)
    ddp = DistributedDataParallel(model)
    for epoch in range(2):                                              # the weight is 0 first, then at its peak
        reg.step(epoch)
        ddp.zero_grad()
        (F.cross_entropy(ddp(pictures()[2 * rank:2 * rank + 2]), torch.arange(4)[2 * rank:2 * rank + 2]) + reg()).backward()
    if rank == 0:
        torch.save(gradient(model), f"{folder}/gradient.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one():
    with tempfile.TemporaryDirectory() as folder:
        in_processes(_ddp_worker, 2, folder)
        found = torch.load(f"{folder}/gradient.pt")
    model = make()
    with SpatialEntropyRegularizer(model, weight=.5, drop_skip=True) as reg:
        (F.cross_entropy(model(pictures()), torch.arange(4)) + reg()).backward()
    assert difference(found, gradient(model)) < 1e-5


@pytest.mark.parametrize("kind", ["compiled", "part"])
def test_the_skip_is_dropped_in_a_ddp_inside(kind):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ddp, x = DistributedDataParallel(make()), pictures(2)
        whole = torch.compile(ddp, backend="eager") if kind == "compiled" else nn.Sequential(ddp, nn.Identity())
        with SpatialEntropyRegularizer(whole, weight=1., drop_skip=True) as reg:
            for _ in range(3):                                          # a count from before stops the second
                (ddp(x).square().mean() + reg()).backward()
        reg.surgery.undo()
        for _ in range(2):
            ddp(x).square().mean().backward()
        assert all(p.grad is not None for p in ddp.parameters())
    finally:
        dist.destroy_process_group()


# ---- Lightning ----


@pytest.fixture
def pl():
    pl = pytest.importorskip("lightning.pytorch")
    return pl


def lit(pl, step=None, model=None):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.vit = model or make()

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.vit(batch[0]), batch[1])
            return step(loss, batch_idx) if step else loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self.vit(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], .1)

    return Module()


def fit(pl, module, *callbacks, data=None, val=None, ckpt=None, **more):
    quiet = dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(**{**quiet, "max_epochs": 1, "callbacks": [*callbacks], **more})
    trainer.fit(module, batches() if data is None else data, val, ckpt_path=ckpt)
    return trainer


def by_hand(weight, steps=((0, 4), (4, 8)), lr=.1, model=None):
    "SGD over slices of the pictures, with the term."
    model, x = model or make(), pictures(8)
    y = torch.arange(8) % 5
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    with SpatialEntropyRegularizer(model, weight) as reg:
        for a, b in steps:
            optimizer.zero_grad()
            (F.cross_entropy(model(x[a:b]), y[a:b]) + reg()).backward()
            optimizer.step()
    return model


def close(a, b, rtol=1e-4):
    for (n, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert_close(p, q, rtol=rtol, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


lightning_warnings = pytest.mark.filterwarnings("ignore")


@lightning_warnings
@pytest.mark.parametrize("kind", ["tensor", "dict", "accumulated"])
def test_lightning_two_steps_equal_a_loop_by_hand(pl, kind):
    callback = se.SpatialEntropyLightning(.5, schedule="constant")
    module = lit(pl, (lambda loss, i: dict(loss=loss, extra=loss.detach())) if kind == "dict" else None)
    more = dict(data=batches(8, 2), accumulate_grad_batches=2) if kind == "accumulated" else {}
    trainer = fit(pl, module, callback, **more)
    close(module.vit, by_hand(.5))
    assert trainer.callback_metrics["entropy"] > 0 and trainer.callback_metrics["entropy_weight"] == .5
    assert is_stock(module) and "training_step" not in vars(module)


@lightning_warnings
def test_lightning_skipped_steps_validation_and_drop_skip(pl):
    callback = se.SpatialEntropyLightning(.5, schedule="constant", drop_skip=True)
    module = lit(pl, lambda loss, i: None if i == 0 else loss)
    trainer = fit(pl, module, callback, val=batches())
    assert callback.regularizer.logs()["entropy"] > 0
    want = make()
    se.drop_last_skip(want)
    by_hand(.5, steps=((4, 8),), model=want)
    close(module.vit, want)
    x, y = pictures(8), torch.arange(8) % 5
    with torch.no_grad():
        losses = [F.cross_entropy(module.vit.eval()(x[i:i + 4]), y[i:i + 4]).item() for i in (0, 4)]
    assert trainer.callback_metrics["val_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)      # without the term
    fit(pl, module, callback)                                                                    # again: the surgery is done once


@lightning_warnings
@pytest.mark.parametrize("path", [None, "vit"])
def test_lightning_drop_skip_before_the_model_is_made(pl, path):
    class Late(type(lit(pl))):
        def __init__(self):
            pl.LightningModule.__init__(self)

        def configure_model(self):
            if not hasattr(self, "vit"):
                self.vit = make()

    with pytest.raises(ValueError, match="Late has no model yet.*drop the skip there"):
        fit(pl, Late(), se.SpatialEntropyLightning(model=path, drop_skip=True))
    module = Late()
    fit(pl, module, se.SpatialEntropyLightning(.5, schedule="constant", model=path))
    fit(pl, module, se.SpatialEntropyLightning(model=path, drop_skip=True))              # now it is there


@lightning_warnings
def test_lightning_gives_the_step_back_after_an_error(pl):
    def step(loss, i):
        if i == 1:
            raise ZeroDivisionError
        return loss

    module = lit(pl, step)
    with pytest.raises(ZeroDivisionError):
        fit(pl, module, se.SpatialEntropyLightning())
    assert is_stock(module) and "training_step" not in vars(module)


@lightning_warnings
def test_lightning_bf16_compiled_and_steps(pl):
    torch._dynamo.reset()
    module = lit(pl)
    callback = se.SpatialEntropyLightning(.5, warmup=.5)
    trainer = fit(pl, torch.compile(module, backend="aot_eager"), callback, precision="bf16-mixed", max_epochs=-1, max_steps=4)
    assert trainer.global_step == 4 and trainer.callback_metrics["entropy_weight"] == pytest.approx(se.entropy_weight(.75, 1, .5, .5))
    assert all(p.isfinite().all() for p in module.parameters()) and is_stock(module)


@lightning_warnings
def test_lightning_knows_what_a_stream_has_not(pl):
    "Without a length one epoch has no share that is done; several have one at their beginnings."
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from zip(pictures(8), torch.arange(8) % 5)

    stream = DataLoader(Stream(), batch_size=4)
    callback = lambda: se.SpatialEntropyLightning(.5, warmup=0., schedule="warmup")
    with pytest.raises(ValueError, match="the data no length"):
        fit(pl, lit(pl), callback(), data=stream)
    for known in (dict(max_steps=2), dict(limit_train_batches=2)):
        assert fit(pl, lit(pl), callback(), data=stream, **known).callback_metrics["entropy_weight"] == .5
    with pytest.warns(UserWarning, match="the weight moves once an epoch"):
        fit(pl, lit(pl), callback(), data=stream, max_epochs=2)


@lightning_warnings
def test_lightning_resumes(pl, tmp_path):
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = trainer.current_epoch == 1

    whole, half, rest = lit(pl), lit(pl), lit(pl)
    fit(pl, whole, se.SpatialEntropyLightning(.5), max_epochs=4)
    fit(pl, half, se.SpatialEntropyLightning(.5), Stop(), max_epochs=4).save_checkpoint(tmp_path / "half.ckpt")
    callback = se.SpatialEntropyLightning(.5)
    fit(pl, rest, callback, max_epochs=4, ckpt=tmp_path / "half.ckpt")
    assert same(whole, rest) and not same(whole, half)
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]["SpatialEntropyLightning"]
    assert state["epoch"] == pytest.approx(3 / 8)
    fit(pl, lit(pl), callback, max_epochs=1)                            # a fit of its own, after the resumed one
    assert callback.regularizer.logs()["entropy"] > 0 and callback._state is None
    callback.load_state_dict({**state, "left_out": torch.tensor(9)} if "left_out" in state else state)
    fit(pl, lit(pl), callback, max_epochs=1)
    assert callback._state is None


@lightning_warnings
def test_copies_of_a_module_in_the_middle_of_a_fit_have_its_own_step(pl, monkeypatch):
    module, callback, copies = lit(pl), se.SpatialEntropyLightning(.5, schedule="constant"), []
    monkeypatch.setattr(sys.modules[__name__], "Lit", type(module), raising=False)       # so that pickle finds it
    type(module).__qualname__ = "Lit"

    class Best(pl.Callback):
        def on_train_batch_end(self, trainer, now, *args):
            copies[:] = copy.deepcopy(now), pickle.loads(pickle.dumps(now))
            for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
                twin.teardown(trainer, now, "fit")                                       # takes nothing off the original

    fit(pl, module, callback, Best())
    close(module.vit, by_hand(.5))
    for twin in copies:
        assert twin.training_step.__self__ is twin and same(twin, module)
        fit(pl, twin)
        assert not same(twin, module) and is_stock(twin)
        fit(pl, twin, se.SpatialEntropyLightning(.5))
    close(module.vit, by_hand(.5))


# ---- Hugging Face ----


class Wrapped(nn.Module):
    "A timm ViT with the signature of a Hugging Face classifier."

    def __init__(self, sums=False):
        super().__init__()
        self.vit, self.sums = make(), sums
        self.accepts_loss_kwargs = sums

    def forward(self, pixel_values, labels, num_items_in_batch=None):
        logits = self.vit(pixel_values)
        if self.sums and num_items_in_batch is not None:
            return dict(loss=F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch, logits=logits)
        return dict(loss=F.cross_entropy(logits, labels), logits=logits)


def hf(folder, model=None, weight=.5, schedule="constant", callbacks=(), **more):
    transformers = pytest.importorskip("transformers")
    from transformers.trainer_callback import PrinterCallback
    ours = {k: more.pop(k) for k in ("drop_skip", "model_init", "entropy_warmup") if k in more}
    args = transformers.TrainingArguments(**{**dict(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=4, learning_rate=.1, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0., logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        train_sampling_strategy="sequential"), **more})
    data = [dict(pixel_values=x, labels=i % 5) for i, x in enumerate(pictures(8))]
    trainer = se.SpatialEntropyTrainer(model=None if "model_init" in ours else model or Wrapped(), args=args, train_dataset=data, eval_dataset=data,
                                       entropy_weight=weight, entropy_schedule=schedule, callbacks=list(callbacks), **ours)
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.mark.parametrize("sums", [False, True], ids=["trainer divides", "model divides"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_trainer_two_steps_equal_a_loop_by_hand(tmp_path, parts, sums):
    trainer = hf(tmp_path, Wrapped(sums), per_device_train_batch_size=4 // parts, gradient_accumulation_steps=parts)
    trainer.train()
    close(trainer.model.vit, by_hand(.5))
    rows = [r for r in trainer.state.log_history if "loss" in r]
    assert len(rows) == 2 and all(r["entropy"] > 0 and r["entropy_weight"] == .5 and r["maps_left_out"] == 0 for r in rows)
    assert is_stock(trainer.model)


def test_trainer_with_a_loss_function_of_ones_own(tmp_path):
    transformers = pytest.importorskip("transformers")
    trainer = hf(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.compute_loss_func = lambda out, labels, num_items_in_batch=None: F.cross_entropy(out["logits"], labels, reduction="sum") / num_items_in_batch
    trainer.model.forward = lambda pixel_values, labels=None: dict(logits=trainer.model.vit(pixel_values))
    trainer.train()
    close(trainer.model.vit, by_hand(.5))
    assert issubclass(se.SpatialEntropyTrainer, transformers.Trainer)


def test_trainer_evaluates_without_the_term_and_trains_twice(tmp_path):
    trainer = hf(tmp_path, eval_strategy="epoch", weight=100.)
    want = trainer.evaluate()["eval_loss"]
    x, y = pictures(8), torch.arange(8) % 5
    with torch.no_grad():
        assert want == pytest.approx(F.cross_entropy(trainer.model.vit(x), y).item(), rel=1e-4)
    trainer.args.learning_rate = 0.
    trainer.train()
    evals = [r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r]
    assert evals[-1] == pytest.approx(want, rel=1e-4)
    trainer.train()
    assert is_stock(trainer.model)


def test_trainer_model_init_drop_skip_and_schedule(tmp_path):
    trainer = hf(tmp_path, model_init=Wrapped, drop_skip=True, schedule="decay", entropy_warmup=.5, num_train_epochs=2)
    trainer.train()
    trainer.train()
    assert is_stock(trainer.model) and not trainer.model.vit.blocks[-1].norm2.weight.requires_grad
    assert [r["entropy_weight"] for r in trainer.state.log_history if "loss" in r] == pytest.approx([se.entropy_weight(i / 4, 1, .5, .5) for i in range(4)])


def test_trainer_resumes(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_save = state.global_step == 3

    more = dict(num_train_epochs=4, save_strategy="steps", save_steps=100, schedule="decay")
    whole, half, rest = hf(tmp_path, **more), hf(tmp_path, callbacks=[Stop()], **more), hf(tmp_path, **more)
    whole.train()
    half.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(whole.model, rest.model) and not same(whole.model, half.model)


def test_trainer_whose_model_is_made_by_the_search(tmp_path):
    trainer = hf(tmp_path, model_init=Wrapped)
    trainer.model = None                                                                     # as Ray's search leaves it
    trainer.train()
    close(trainer.model.vit, by_hand(.5))
    assert is_stock(trainer.model)


def test_trainer_errors_and_cleaning_up(tmp_path):
    with pytest.raises(ValueError, match="a share of the run"):
        hf(tmp_path, entropy_warmup=3)
    trainer = hf(tmp_path)
    trainer.train_dataset[1]["pixel_values"] = None
    with pytest.raises((TypeError, ValueError, AttributeError)):
        trainer.train()
    assert is_stock(trainer.model)


# ---- two processes ----


def _train_transformers(rank, folder):
    trainer = hf(folder, Wrapped(True), per_device_train_batch_size=1, gradient_accumulation_steps=2, ddp_backend="gloo")
    trainer.train()
    if trainer.args.process_index == 0:
        torch.save(trainer.model.vit.state_dict(), f"{folder}/weights.pt")
    dist.destroy_process_group()


def _train_lightning(rank, folder):
    import lightning.pytorch as pl
    from lightning.pytorch.trainer.connectors import accelerator_connector
    accelerator_connector._IS_INTERACTIVE = False        # cells of a notebook may have run in the process that this one was forked from
    data = torch.utils.data.Subset(batches().dataset, range(rank, 8, 2))
    module = lit(pl)
    trainer = fit(pl, module, se.SpatialEntropyLightning(.5, schedule="constant"), data=DataLoader(data, batch_size=1), use_distributed_sampler=False,
                  accumulate_grad_batches=2, devices=2, strategy="ddp")
    if trainer.global_rank == 0:
        torch.save(module.vit.state_dict(), f"{folder}/weights.pt")


def _framework_worker(rank, train, folder, port):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    PartialState._reset_state()                          # accelerate may have been used here before, by one process alone
    AcceleratorState._reset_state(True)
    train(rank, folder)


@pytest.mark.parametrize("framework", ["transformers", "lightning"])
def test_two_processes_of_two_parts_equal_a_loop_by_hand(tmp_path, framework):
    pytest.importorskip(framework)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    in_processes(_framework_worker, 2, globals()[f"_train_{framework}"], str(tmp_path), port)
    found = make()
    found.load_state_dict(torch.load(tmp_path / "weights.pt"))
    close(found, by_hand(.5))


# ---- fastai ----


def learner(*cbs, model=None, size=4, valid=True):
    pytest.importorskip("fastai")
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import SGD
    learn = Learner(DataLoaders(batches(8, size), batches(), device=torch.device("cpu")), model or make(), loss_func=nn.CrossEntropyLoss(), cbs=[*cbs],
                    opt_func=SGD, wd=0.)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == "progress"])
    learn.logger = lambda row: None
    return learn


fastai_warnings = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@fastai_warnings
@pytest.mark.parametrize("accumulated", [False, True])
def test_fastai_two_steps_equal_a_loop_by_hand(accumulated):
    pytest.importorskip("fastai")
    from fastai.callback.training import GradientAccumulation
    learn = learner(se.SpatialEntropyFastai(.5, schedule="constant"), *([GradientAccumulation(4)] if accumulated else []), size=2 if accumulated else 4)
    learn.fit(1, .1)
    close(learn.model, by_hand(.5))
    names, values = list(learn.recorder.metric_names), learn.recorder.values[-1]
    assert names[3:5] == ["entropy", "entropy_weight"] and values[2] > 0 and values[3] == .5
    assert is_stock(learn.model) and len(learn.validate()) == 1


@fastai_warnings
def test_fastai_fits_again_and_after_an_error_and_predicts():
    pytest.importorskip("fastai")
    from fastai.callback.core import Callback

    class Fails(Callback):
        def before_step(self):
            raise ZeroDivisionError("now")

    callback = se.SpatialEntropyFastai(.5, drop_skip=True)
    learn = learner(callback)
    assert not learn.model.blocks[-1].norm2.weight.requires_grad
    with pytest.raises(ZeroDivisionError):
        learn.fit(1, .1, cbs=Fails())
    learn.fit(2, .1)
    assert is_stock(learn.model) and not learn.metrics
    assert [v[3] for v in learn.recorder.values] == pytest.approx([se.entropy_weight(e / 4, 1, .5, .1) for e in (1, 3)])
    preds, _ = learn.get_preds(dl=learn.dls.valid)
    assert_close(preds, learn.model.eval()(pictures(8)).detach())
    learn.remove_cb(callback)
    assert pickle.loads(pickle.dumps(callback)).settings == callback.settings


# ---- timm's tasks ----


def task_of(model=None, **more):
    from timm.task import ClassificationTask
    return se.spatial_entropy_task(ClassificationTask(model or make(), nn.CrossEntropyLoss(), verbose=False), **more)


@pytest.mark.parametrize("kind", ["plain", "compiled", "distributed"])
def test_task_two_steps_equal_a_loop_by_hand(kind, tmp_path):
    torch._dynamo.reset()
    task = task_of(weight=.5)
    model = task.trainable_module
    if kind == "compiled":
        task.compile(backend="aot_eager")
    if kind == "distributed":
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        task.prepare_distributed()
    try:
        optimizer = torch.optim.SGD(model.parameters(), .1)
        for x, y in batches():
            optimizer.zero_grad()
            result = task(x, y)
            result["loss"].backward()
            optimizer.step()
    finally:
        if kind == "distributed":
            dist.destroy_process_group()
    close(model, by_hand(.5))
    assert result["entropy_loss"] == .5 * result["entropy"] and result["output"].shape == (4, 5)
    task.regularizer.close()


def test_task_of_feature_distillation_keeps_its_state():
    from timm.task import FeatureDistillationTask

    def new(**more):
        return se.spatial_entropy_task(FeatureDistillationTask(make(), make(embed_dim=24, num_heads=3), nn.CrossEntropyLoss(), distill_loss_weight=1.,
                                                               verbose=False), **more)

    task = new(weight=.5, epochs=10)
    task.regularizer.step(4)
    x, y = next(iter(batches()))
    result = task(x, y)
    assert_close(result["loss"], result["task_loss"] + result["kd_loss"] + result["entropy_loss"])
    task.trainable_module.projection.weight.data.fill_(.25)
    state = task.get_checkpoint_state()
    other = new(weight=.5, epochs=10)
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    assert other.regularizer.epoch == 4 and (other.trainable_module.projection.weight == .25).all()
    other.load_checkpoint_state(state["state_dict"], {"projection": state["task_state"]["projection"]})       # of a run without the term
    assert other.regularizer.epoch == 4
    evaluator = task.create_evaluator()
    assert type(evaluator).__name__ == "ClassificationEvaluator"


def test_task_copies_pickles_and_refusals():
    task = task_of()
    x, y = next(iter(batches()))
    task(x, y)
    for twin in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert type(twin) is type(task) and is_stock(twin) and same(twin, task)
        with pytest.raises(RuntimeError, match="closed, or a copy"):
            twin(x, y)
    with pytest.raises(TypeError, match="without the term"):
        se.spatial_entropy_task(task)
    with pytest.raises(TypeError, match="got VisionTransformer"):
        se.spatial_entropy_task(make())


# ---- torchmetrics ----


def random_maps(n=7, heads=3, seed=0):
    maps = torch.randn(n, heads, 6, 5, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    maps[1, 0] = 2.                                                     # nothing above its mean
    return maps


def directly(maps):
    E = [se.spatial_entropy(m).item() for m in maps.flatten(0, 1)]
    regions = [se.label_regions(se.above_mean(m)).max().item() for m in maps.flatten(0, 1)]
    return dict(entropy=sum(E) / len(E), regions=sum(regions) / len(E), empty=regions.count(0) / len(E), left_out=0)


def metric_of(*args, **kwargs):
    pytest.importorskip("torchmetrics")
    return se.SpatialEntropyMetric(*args, **kwargs)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_metric_equals_a_direct_computation(size):
    metric, maps = metric_of(3, per="head"), random_maps()
    assert all(v.isnan() for k, v in _silent(metric.compute).items() if "left_out" not in k)
    for part in maps.split(size):
        metric.update(part)
    got = {k: v.item() for k, v in metric.compute().items()}
    assert {k: got[k] for k in directly(maps)} == pytest.approx(directly(maps), rel=1e-5)
    for h in range(3):
        assert {k: got[f"{k}_head{h}"] for k in directly(maps)} == pytest.approx(directly(maps[:, h:h + 1]), rel=1e-5)
    with torch.inference_mode():                                        # as after a validation
        metric.update(maps)
        metric.reset()
    metric.update(maps[:2])
    assert {k: v.item() for k, v in metric.compute().items() if "head" not in k} == pytest.approx(directly(maps[:2]), rel=1e-5)


def _silent(call):
    with pytest.warns(UserWarning, match="was called before"):
        return call()


def test_metric_of_blocks_with_different_heads():
    metric, maps = metric_of({2: 3, 5: 6}, per="block"), {2: random_maps(), 5: random_maps(7, 6, 1)[..., :4, :4]}
    metric.update({5: maps[5], 2: maps[2]})                             # in any order
    got = {k: v.item() for k, v in metric.compute().items()}
    for b in (2, 5):
        assert {k: got[f"{k}_block{b}"] for k in directly(maps[b])} == pytest.approx(directly(maps[b]), rel=1e-5)
    want = (directly(maps[2])["entropy"] * 21 + directly(maps[5])["entropy"] * 42) / 63
    assert got["entropy"] == pytest.approx(want, rel=1e-5) and len(got) == 12


@pytest.mark.filterwarnings("ignore:spatial_entropy. got maps with NaN")
def test_metric_leaves_broken_maps_out():
    metric, maps = metric_of(3), random_maps()
    maps[2, 1, 0, 0] = torch.inf
    metric.update(maps)
    kept = torch.cat([m[None, None] for i, m in enumerate(maps.flatten(0, 1)) if i != 7])
    got = {k: v.item() for k, v in metric.compute().items()}
    assert got == pytest.approx(directly(kept) | dict(left_out=1), rel=1e-5)


def test_metrics_of_four_and_of_eight_neighbours_stay_apart_in_a_collection():
    torchmetrics = pytest.importorskip("torchmetrics")
    square, diagonal = torch.zeros(1, 1, 4, 4), torch.eye(4)[None, None]
    square[..., :2, :2] = 1                                            # the same for both; the other is not
    both = torchmetrics.MetricCollection({"eight": metric_of(1), "four": metric_of(1, connectivity=4)})
    for maps in (square, diagonal):
        both.update(maps)
    found = both.compute()
    assert found["eight_regions"] == 1 and found["four_regions"] == 2.5
    assert found["eight_entropy"] == 0 and found["four_entropy"] == pytest.approx(math.log(4) / 2, rel=1e-5)


def test_metric_forward_collection_and_copies():
    torchmetrics = pytest.importorskip("torchmetrics")
    from torchmetrics.classification import MulticlassAccuracy
    both = torchmetrics.MetricCollection([MulticlassAccuracy(5), metric_of(3)])
    maps, y = random_maps(), torch.arange(7) % 5
    for i in (0, 4):
        batch = both(preds=F.one_hot(y[i:i + 4], 5).float(), target=y[i:i + 4], maps=maps[i:i + 4])
    assert batch["entropy"] == pytest.approx(directly(maps[4:])["entropy"], rel=1e-5)
    total = both.compute()
    assert total["entropy"] == pytest.approx(directly(maps)["entropy"], rel=1e-5) and total["MulticlassAccuracy"] == 1
    for twin in (copy.deepcopy(both), pickle.loads(pickle.dumps(both)), both.clone()):
        assert twin.compute() == total


@pytest.mark.parametrize("call,error,said", [
    (lambda: metric_of(3).update(random_maps(2, 4)), ValueError, r"got shape \(2, 4, 6, 5\), expected \(B, 3, h, w\)"),
    (lambda: metric_of(3).update(random_maps()[0]), ValueError, "expected"), (lambda: metric_of(3).update({0: random_maps()}), TypeError, r"got blocks \[0\]"),
    (lambda: metric_of({0: 3}).update(random_maps()), TypeError, r"expected a dict of the blocks \[0\]"),
    (lambda: metric_of({0: 3, 1: 3}).update({0: random_maps()}), TypeError, r"got blocks \[0\]"),
    (lambda: metric_of(0), ValueError, "heads: got 0"), (lambda: metric_of({}), ValueError, "heads: got {}"),
    (lambda: metric_of(3, per="map"), ValueError, "per: got"),
])
def test_metric_refusals(call, error, said):
    with pytest.raises(error, match=said):
        call()


def _metric_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    metric = se.SpatialEntropyMetric(3, per="head")
    if rank < 2:                                                        # the third process sees no picture
        metric.update(random_maps()[:5] if rank == 0 else random_maps()[5:])
    if rank == 0:
        torch.save(metric.compute(), f"{folder}/scores.pt")
    else:
        metric.compute()
    assert (metric.sums[0] == (5, 2, 0)[rank]).all()                    # its own sums are back after the gathering
    dist.destroy_process_group()


def test_metric_in_three_processes():
    pytest.importorskip("torchmetrics")
    with tempfile.TemporaryDirectory() as folder:
        in_processes(_metric_worker, 3, folder)
        got = {k: v.item() for k, v in torch.load(f"{folder}/scores.pt").items()}
    assert {k: got[k] for k in directly(random_maps())} == pytest.approx(directly(random_maps()), rel=1e-5) and len(got) == 16
