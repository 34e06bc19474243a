"""Corruptions and occlusion: what was changed of a picture, counted independently; flat, broken and useless maps; what is missing."""
import json
import sys
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import spatial_entropy as se
from spatial_entropy.analysis import robustness
from spatial_entropy.analysis.evaluation import score_masks
from spatial_entropy.analysis.robustness import COMMON, ORDERS, Occlusion, corrupted, corruption_accuracy, corruption_scores, occlusion_curves
from spatial_entropy.commands import main

NORM = dict(mean=(.5, .5, .5), std=(.25, .25, .25))


class Brightness(torch.nn.Module):
    "Right where the mean of what it sees is above a threshold: what is removed can be counted by hand."
    def __init__(self, threshold):
        super().__init__()
        self.threshold, self.seen = threshold, []

    def forward(self, x):
        self.seen.append(x)
        bright = (x.mean((1, 2, 3)) > self.threshold).float()
        return torch.stack([1 - bright, bright], 1)


def loader_of(x, label, batch=4):
    return DataLoader(TensorDataset(x, label), batch)


def test_accuracy_under_corruptions_is_that_of_pictures_corrupted_one_by_one():
    corrupt = pytest.importorskip("imagecorruptions").corrupt
    bytes_ = torch.tensor(se.shapes(10, "val", 48).images)
    x = (bytes_.permute(0, 3, 1, 2)/255 - .5)/.25
    model, label = Brightness(-.4), torch.arange(10) % 2
    found = corruption_accuracy(model, loader_of(x, label), **NORM, names=["contrast", "brightness", "pixelate"], severities=(2, 5))
    assert_close(found.clean, (x.mean((1, 2, 3)) > -.4).long() == label)
    for name in ("contrast", "brightness", "pixelate"):              # nothing of these is random
        for column, severity in enumerate((2, 5)):
            worse = np.stack([corrupt(p, corruption_name=name, severity=severity) for p in bytes_.numpy()])
            x = (torch.tensor(worse).permute(0, 3, 1, 2)/255 - .5)/.25
            assert_close(found.right[name][:, column], (x.mean((1, 2, 3)) > -.4).long() == label)
    scores = found.scores()
    every = torch.cat([*found.right.values()], 1).double()
    assert scores["corruption_top1"] == pytest.approx(100*every.mean().item())
    assert scores["corruption_low"] <= scores["corruption_mean"] <= scores["corruption_high"]
    assert scores["corruption_lost_mean"] == pytest.approx(100*(every.mean() - found.clean.double().mean()).item(), abs=1e-4)
    assert [row["corruption"] for row in scores["corruptions"]] == ["contrast", "brightness", "pixelate"]
    json.dumps(scores)


def test_corruptions_depend_on_the_picture_and_the_seed_alone():
    pytest.importorskip("imagecorruptions")
    x, label = torch.rand(9, 3, 32, 32)*4 - 2, torch.zeros(9, dtype=torch.long)
    def seen(batch, seed=0, pictures=None):
        model = Brightness(0.)
        corruption_accuracy(model, loader_of(x, label, batch), **NORM, names=["gaussian_noise", "glass_blur"], severities=(3,), seed=seed, pictures=pictures)
        return [torch.cat(model.seen[k::3]) for k in range(3)]       # clean, and the two
    np.random.seed(5)
    want = np.random.RandomState(5).rand()
    one, two, other = seen(4), seen(9), seen(4, seed=1)
    assert np.random.rand() == want                                  # the generator is as it was
    for a, b, c in zip(one, two, other):
        assert torch.equal(a, b) and (torch.equal(a, c) or a is not one[0])
    assert not torch.equal(one[1], other[1]) and not torch.equal(one[1][0], one[1][1])
    few = seen(4, pictures=3)
    assert all(torch.equal(a, b[::3]) for a, b in zip(few, one))      # every third, and each as before


def test_all_fifteen_change_a_picture_more_with_severity():
    pytest.importorskip("imagecorruptions")
    photo = se.shapes(3, "val", 64).images[2]
    assert len(COMMON) == 15
    for name in COMMON:
        mild, strong = (np.abs(corrupted(photo, name, s).astype(float) - photo).mean() for s in (1, 5))
        assert 0 < mild < strong, name


@pytest.mark.parametrize("given, said", [
    ((np.zeros((40, 40, 3), np.uint8), "rain", 1), "got 'rain', expected one of gaussian_noise"),
    ((np.zeros((40, 40, 3), np.uint8), "fog", 0), "severity: got 0"),
    ((np.zeros((31, 40, 3), np.uint8), "fog", 1), "H and W at least 32"), ((np.zeros((40, 40), np.uint8), "fog", 1), "expected .H, W, 3. of uint8"),
    ((np.zeros((40, 40, 3)), "fog", 1), "of float64")])
def test_pictures_and_names_that_cannot_be(given, said):
    with pytest.raises(ValueError, match=said):
        corrupted(*given)


def test_without_the_library_it_is_said_how_to_get_it():
    old = type(sys)("imagecorruptions")
    old.corrupt, old.corruptions = None, type(sys)("imagecorruptions.corruptions")
    old.corruptions.glass_blur = lambda x, severity=1: x
    there = {"imagecorruptions": old, "imagecorruptions.corruptions": old.corruptions}
    for modules, said in ((dict(imagecorruptions=None), "cannot be imported"), (there, "the old imagecorruptions")):
        with patch.dict(sys.modules, modules), pytest.raises(ImportError, match=said) as refused:
            corruption_scores()
        assert "pip install -e '.[robustness]'" in str(refused.value)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(8)
    return model


def plain_curve(model, x, label, order_of, shares):
    "Right or not, one picture and share at a time, square by square."
    right = torch.zeros(len(x), len(shares), dtype=torch.bool)
    for i in range(len(x)):
        cells = order_of(i)
        for k, share in enumerate(shares):
            one = x[i].clone()
            for cell in cells[:round(share*16)]:
                r, c = divmod(int(cell), 4)
                one[:, 8*r:8*r + 8, 8*c:8*c + 8] = 0
            with torch.no_grad():
                right[i, k] = model(one[None]).argmax(-1) == label[i]
    return right


@pytest.mark.parametrize("head", [None, 1])
def test_curves_are_those_of_squares_painted_one_by_one(vit, head):
    x = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with se.AttentionTap(vit) as tap, torch.no_grad():
        label = vit(x).argmax(-1)
        weights = tap.maps().flatten(2).softmax(-1)
    label[2] = (label[2] + 1) % 3
    maps, shares = weights.mean(1) if head is None else weights[:, head], (0., .25, .5, 1.)
    found = occlusion_curves(vit, loader_of(x, label, 3), shares, head=head)
    order = lambda sign: lambda i: (sign*maps[i]).argsort(descending=True)
    for name, sign in (("most", 1), ("least", -1)):
        assert_close(found.right[name], plain_curve(vit, x, label, order(sign), shares))
    others = [plain_curve(vit, x, label, lambda i, j=j: maps[j].argsort(descending=True), shares) for j in range(7)]
    for i in range(7):                                                # another picture's, for each
        assert any(torch.equal(found.right["others"][i], others[j][i]) for j in range(7) if j != i)
    assert found.right["most"][2, 0] == 0 and found.right["most"][:, 0].sum() == 6
    for name in ORDERS:
        assert torch.equal(found.right[name][:, 0], found.right["most"][:, 0]) and torch.equal(found.right[name][:, -1], found.right["most"][:, -1])
        area = np.trapezoid(found.right[name].double().numpy(), shares, axis=1)
        assert_close(found.areas(name).double(), torch.tensor(area))
    assert found.curve("most") == pytest.approx((100*found.right["most"].double().mean(0)).tolist())
    scores = found.scores()
    assert scores["occlusion_most_above"] == pytest.approx(scores["occlusion_most"] - scores["occlusion_others"], abs=1e-4)
    json.dumps(scores)


def test_flat_maps_remove_as_chance_does_and_broken_ones_are_left_out(vit):
    x, label = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.zeros(6, dtype=torch.long)
    real = se.AttentionTap.maps
    with patch.object(se.AttentionTap, "maps", lambda tap: torch.zeros_like(real(tap))):
        flat = occlusion_curves(vit, loader_of(x, label), (0., .3, .6))
    assert all(torch.equal(flat.right[name], flat.right["random"]) for name in ("most", "least", "others"))
    def broken(tap):
        maps = real(tap).clone()
        maps[0, 0, 0, 0] = torch.nan
        return maps
    with patch.object(se.AttentionTap, "maps", broken):
        found = occlusion_curves(vit, loader_of(x, label), (0., .5))  # batches of 4 and 2: one of each is left out
    assert found.left_out == 2 and len(found.right["most"]) == 4
    with torch.no_grad():
        assert torch.equal(found.right["most"][:, 0], (vit(x).argmax(-1) == label)[[1, 2, 3, 5]])
    with patch.object(se.AttentionTap, "maps", lambda tap: real(tap)*torch.nan), pytest.raises(ValueError, match=r"got 0 picture\(s\) with a map"):
        occlusion_curves(vit, loader_of(x, label), (0., .5))


def test_a_map_that_knows_falls_below_the_maps_of_others_and_one_for_all_does_not(vit):
    "A classifier that reads one square, which differs by picture, and maps that show it, or always the middle."
    where = torch.arange(40) % 16
    cells = torch.nn.functional.one_hot(where, 16).view(40, 1, 4, 4).float()
    x = torch.nn.functional.interpolate(cells, size=32).expand(40, 3, 32, 32).contiguous()

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = vit

        def forward(self, x):
            self.vit(x)
            bright = (x.amax((1, 2, 3)) > .5).float()
            return torch.stack([1 - bright, bright], 1)

    label = torch.ones(40, dtype=torch.long)
    line, model, shares = loader_of(x, label, 10), Reader(), (0., .0625, .25, .5)
    shown = lambda at: lambda tap: 9*at[next(batches)][:, None].view(10, 1, 4, 4)
    for maps, knows in ((cells[:, 0], True), (torch.eye(4).expand(40, 4, 4), False)):
        batches = iter(torch.arange(40).split(10))
        with patch.object(se.AttentionTap, "maps", shown(maps)):
            scores = occlusion_curves(model, line, shares).scores()
        assert (scores["occlusion_most_above_high"] < -30) == knows and (scores["occlusion_most_above"] == 0) != knows
        if knows:
            assert scores["occlusion"]["most"] == [100., 0., 0., 0.]


@pytest.mark.parametrize("options, said", [
    (dict(shares=(.1, .5)), "shares: got"), (dict(shares=(0., .5, .4)), "rising"), (dict(shares=(0.,)), "two or more"), (dict(shares=(0., 1.2)), "rising"),
    (dict(pictures=0), "pictures: got 0"), (dict(pictures=1), "at least 2: chance needs the maps of others"),
    (dict(head=7), "head: got 7, expected a number from 0 to 1, or None"), (dict(head="0"), "head: got '0'"),
    (dict(block="all"), "block: got 'all', which is 2 attention layers, expected one")])
def test_what_cannot_be_occluded(vit, options, said):
    with pytest.raises(ValueError, match=said):
        occlusion_curves(vit, loader_of(torch.randn(5, 3, 32, 32), torch.zeros(5, dtype=torch.long)), **options)


def test_one_block_may_be_a_list(vit):
    line = loader_of(torch.randn(5, 3, 32, 32), torch.zeros(5, dtype=torch.long))
    assert occlusion_curves(vit, line, block=[-1]).scores() == occlusion_curves(vit, line).scores()


def test_pixels_that_no_patch_sees_are_not_removed():
    "41 pixels have two patches of 14 a side where the model drops the rest, three where it pads."
    cell = torch.tensor([[3, 0, 1, 2]])
    dropped = robustness._removed(cell, 1, ((2, 2), (0, 0, 28/41, 28/41)), (41, 41))[0, 0]
    padded = robustness._removed(torch.arange(8, -1, -1)[None], 1, ((3, 3), (0, 0, 42/41, 42/41)), (41, 41))[0, 0]
    assert dropped.sum() == 14**2 and dropped[14:28, 14:28].all()
    assert padded.shape == (41, 41) and padded.sum() == 13**2 and padded[28:, 28:].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["timm", "transformers"])
def test_classifiers_of_either_library_and_any_type_are_measured(family, dtype):
    torch.manual_seed(0)
    if family == "timm":
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    else:
        tf = pytest.importorskip("transformers")
        model = tf.ViTForImageClassification(tf.ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
                                                          image_size=32, patch_size=8, num_labels=3))
    model, x, label = model.eval().to(dtype), torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad(): out = model(x.to(dtype))
    right = getattr(out, "logits", out).argmax(-1) == label
    assert se.accuracy(model, loader_of(x, label)) == pytest.approx(100*right.float().mean().item())
    assert torch.equal(occlusion_curves(model, loader_of(x, label), (0., .5)).right["most"][:, 0], right)
    assert score_masks(model, torch.utils.data.TensorDataset(x, x[:, 0] > 0))["mask_pairs"] == 6


def test_what_gives_no_logits_is_no_classifier(vit):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2)
    model.forward_head = lambda x: x                                   # (B, N, C)
    with pytest.raises(TypeError, match=r"model: it gave shape \(2, 17, 24\), expected logits \(B, classes\)"):
        se.accuracy(model, loader_of(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)))


def test_a_model_keeps_its_mode_and_a_progress_bar_knows_its_length(vit):
    x, label, lengths = torch.randn(5, 3, 32, 32), torch.zeros(5, dtype=torch.long), []
    def bar(steps):
        lengths.append((len(steps), 0))
        for step in steps:
            lengths[-1] = len(steps), lengths[-1][1] + 1
            yield step
    vit.train()
    found = occlusion_curves(vit, loader_of(x, label, 2), (0., .5), progress=bar)
    assert vit.training and isinstance(found, Occlusion) and lengths == [(3, 3), (3, 3)]
    vit.eval()
    if "imagecorruptions" in sys.modules:
        corruption_accuracy(vit, loader_of(x, label, 2), **NORM, names=["contrast"], severities=(1, 2), progress=bar)
        assert lengths[-1] == (9, 9)


def test_the_command_adds_to_evaluation_json(tmp_path, capsys, vit):
    from spatial_entropy.training.config import TrainConfig, save_config
    from spatial_entropy.training.models import save_weights
    pytest.importorskip("imagecorruptions")
    run, kwargs = tmp_path/"run", dict(patch_size=8, embed_dim=24, depth=1, num_heads=2)
    run.mkdir()
    config = TrainConfig(img_size=32, model_kwargs=kwargs, keep_skip=True, workers=0)
    save_config(run, config, classes=se.shapes(1).classes, mean=(.5,)*3, std=(.5,)*3)
    save_weights(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, **kwargs).state_dict(), run/"model.safetensors")
    assert main(f"evaluate {run} --corruptions contrast fog --occlusion --pictures 6".split()) == 0
    said, found = capsys.readouterr().out, json.loads((run/"evaluation.json").read_text(encoding="utf-8"))
    assert "top-1 under corruptions" in said and "most attended removed" in said
    assert found["corruption_pictures"] == 6 == found["occlusion_pictures"] and [r["corruption"] for r in found["corruptions"]] == ["contrast", "fog"]
    assert len(found["occlusion"]["most"]) == len(found["occlusion"]["shares"]) == 10
    for wrong, sentence in (("--corruptions rain", "corruption: got 'rain'"), ("--pictures 4", "goes with --corruptions or --occlusion"),
                            ("--occlusion --pictures 0", "pictures: got 0")):
        assert main(f"evaluate {run} {wrong}".split()) == 2
        assert sentence in (err := capsys.readouterr().err) and err.count("\n") == 1
