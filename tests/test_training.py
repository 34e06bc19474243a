"""Folders as people have them, and runs that go wrong."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import spatial_entropy as se


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
    assert b.classes == ("a", "b", "c") and len(b.train.dataset) == 18 and len(b.val.dataset) == 4
    assert [Path(p).parent.name for p, _ in b.val.dataset.samples] == [b.classes[i] for _, i in b.val.dataset.samples]
    assert sorted(i for _, i in b.val.dataset.samples) == [0, 0, 2, 2]       # c keeps its number although val has no b


def test_limit_is_balanced_and_the_split_depends_on_the_seed_alone(tmp_path):
    root = str(folder(tmp_path, a=20, b=20))
    one, two, other = (se.loaders(root, 32, 4, seed=s, limit=10) for s in (1, 1, 2))
    labels = [i for _, i in one.train.dataset.samples]
    assert labels.count(0) == labels.count(1) == 5 and len(one.val.dataset) == 8
    assert one.val.dataset.samples == two.val.dataset.samples != other.val.dataset.samples
    assert not {p for p, _ in one.train.dataset.samples} & {p for p, _ in one.val.dataset.samples}


@pytest.mark.parametrize("classes,said", [
    ({"train/a": 3, "train/b": 3}, "has train/ but no val/"),
    ({"train/a": 3, "train/b": 3, "val/x": 2}, "has classes that train/ has not: x"),
    ({"only": 9}, r"found 1 class \(only\); expected a subfolder for each"),
    ({"a": 1, "b": 0}, "found 1 class"),
])
def test_folder_mistakes(tmp_path, classes, said):
    with pytest.raises(ValueError, match=said):
        se.loaders(str(folder(tmp_path, **classes)), 32, 2)


def test_keep_skip_leaves_a_stock_model(tmp_path):
    run = se.train(limit=32, epochs=1, output=str(tmp_path), experiment="x", keep_skip=True, model_kwargs=dict(depth=1), entropy_weight=0.)
    model, config, _ = se.load_run(run.folder)
    assert config.keep_skip and type(model.blocks[-1]) is timm.models.vision_transformer.Block
    assert all(p.requires_grad for p in model.parameters())


def test_the_regulariser_lowers_entropy_when_it_is_all_there_is():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=2)
    x, loss = torch.tensor(se.shapes(32).images).permute(0, 3, 1, 2) / 255, se.SpatialEntropyLoss()
    optimizer, values = torch.optim.AdamW(model.parameters(), 1e-3), []
    with se.AttentionTap(model) as tap:
        for _ in range(30):
            model(x)
            values.append(loss(tap.maps()))
            optimizer.zero_grad()
            values[-1].backward()
            optimizer.step()
    assert values[-1] < .5 * values[0]


def test_a_loss_that_is_no_number_ends_in_a_sentence(tmp_path):
    said = subprocess.run([str(Path(sys.executable).with_name("spatial-entropy")), *"train --limit 96 --epochs 2 --lr 1e30 --warmup-epochs 0".split(),
                           "--output", str(tmp_path)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert said.returncode == 1 and "the loss is nan; lower --lr" in said.stderr and "Traceback" not in said.stderr
