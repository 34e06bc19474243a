"""Pictures from folders, tars, shards, torchvision and Hugging Face: the same ones, in the same order, or a sentence that says why not."""
import io
import json
import multiprocessing
import pickle
import re
import sys
import tarfile

import numpy as np
import pytest
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from spatial_entropy.data import drawn_sets, mask_pairs
from spatial_entropy.training.archives import RowSource, sources
from spatial_entropy.training.config import is_drawn
from spatial_entropy.training.files import to_install
from spatial_entropy.training.sources import Source, _by_share, _take_turns, check_drawn, names_digest


def picture(i):
    return Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 10, 3), dtype=np.uint8))


def png(i):
    out = io.BytesIO()
    picture(i).save(out, "PNG")
    return out.getvalue()


def folder(root, **classes):
    "folder(root, **{'train/cat': 5}): every picture is another one."
    n = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(png(n))
            n += 1
    return root


def tar(path, **members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as t:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return path


def shard(path, numbers, kind="cls", label=lambda i: i % 2):
    text = (lambda i: json.dumps({"label": label(i), "id": i})) if kind == "json" else lambda i: f"{label(i)}\n"
    return tar(path, **{k: v for i in numbers for k, v in ((f"{i:04}.png", png(i)), (f"{i:04}.{kind}", text(i).encode()))})


def contents(source):
    return [(np.asarray(source.open(i)).tobytes(), source.labels[i]) for i in range(len(source))]


def found(source):
    return sorted(contents(source))


# folders and tars

@pytest.mark.parametrize("val", ["val", "validation", "valid"])
def test_folder_with_parts(tmp_path, val):
    train, valid = sources(str(folder(tmp_path, **{"train/b": 3, "train/a": 3, "train/c": 3, f"{val}/c": 2, f"{val}/a": 2})))
    assert train.classes == valid.classes == ("a", "b", "c") and len(train) == 9 and valid.labels == [0, 0, 2, 2]
    assert valid.name(2) == f"{val}/c/0.png" and all(train.name(i).split("/")[1] == "abc"[train.labels[i]] for i in range(9))
    assert isinstance(train, Source) and train.open(0).mode == "RGB"


def test_parts_of_other_names(tmp_path):
    root = folder(tmp_path, **{"fit/a": 3, "fit/b": 3, "try/a": 1, "val/a": 5})
    train, val = sources(root, train_split="fit", val_split="try")
    assert len(train) == 6 and len(val) == 1
    with pytest.raises(ValueError, match="has no learn/"):
        sources(root, train_split="learn")


@pytest.mark.parametrize("wrap", ["", "./", "pets/"])
def test_a_tar_is_its_folder(tmp_path, wrap):
    root = folder(tmp_path / "f", **{"train/a": 3, "train/b": 4, "val/b": 2})
    with tarfile.open(tmp_path / "all.tar", "w") as t:
        t.add(root, wrap.rstrip("/"))
    a, b = sources(root, seed=5), sources(tmp_path / "all.tar", seed=5)
    assert [contents(x) for x in a] == [contents(x) for x in b] and b[1].name(0) == f"all.tar:{wrap.removeprefix('./')}val/b/0.png"


def test_one_tar_for_each_part(tmp_path):
    root = folder(tmp_path / "f", **{"train/a": 3, "train/b": 4, "val/b": 2})
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as t:
            t.add(root / part, "")
    (tmp_path / "tars").mkdir()
    for part in ("train", "val"):
        (tmp_path / f"{part}.tar").rename(tmp_path / "tars" / f"{part}.tar")
    assert [contents(x) for x in sources(root)] == [contents(x) for x in sources(tmp_path / "tars")]


def test_hidden_files_and_other_kinds(tmp_path):
    root = folder(tmp_path, a=3, b=3, **{".ipynb_checkpoints": 2})
    picture(7).save(root / "a" / "x.WEBP", lossless=True)
    (root / "a" / "._1.png").write_bytes(b"junk")
    (root / "a" / "notes.txt").write_text("no picture")
    train, val = sources(root)
    assert train.classes == ("a", "b") and len(train) + len(val) == 7


def test_unreadable_pictures_raise_what_is_promised(tmp_path):
    root = folder(tmp_path, **{"train/a": 2, "train/b": 2, "val/a": 3})
    (root / "val/a/0.png").write_bytes(b"text")
    (root / "val/a/1.png").write_bytes(png(0)[:60])
    _, val = sources(root)
    with pytest.raises(OSError, match="^val/a/0.png: is not a picture that Pillow knows$"):
        val.open(0)
    (root / "val/a/2.png").unlink()
    for i in range(3):
        with pytest.raises((OSError, SyntaxError, ValueError)):
            val.open(i)


def test_odd_errors_of_decoders_become_oserror(monkeypatch):
    _, val = sources("shapes", img_size=8)
    monkeypatch.setattr(type(val), "_open", lambda self, item: {}["no such tag"])
    with pytest.raises(OSError, match=r"shapes/val\[4\]: cannot be decoded \(KeyError"):
        val.open(4)
    with pytest.raises(IndexError):
        val.open(5000)


# shards

@pytest.mark.parametrize("kind", ["cls", "json"])
@pytest.mark.parametrize("prefix", ["", "wds/"])
def test_shards(tmp_path, kind, prefix):
    shard(tmp_path / "set-train-0.tar", range(0, 8), kind)
    shard(tmp_path / "set-train-1.tar", range(8, 14), kind)
    shard(tmp_path / "set-validation-0.tar", range(20, 25), kind)
    train, val = sources(f"{prefix}{tmp_path}")
    assert train.classes == ("0", "1") and val.name(0) == "set-validation-0.tar:0020.png"
    assert contents(val) == [(picture(i).tobytes(), i % 2) for i in range(20, 25)]
    assert found(train) == sorted((picture(i).tobytes(), i % 2) for i in range(14))


@pytest.mark.parametrize("where,expected", [
    ("train-{000..001}.tar", 12), ("train-*.tar", 18), ("{train,val}-*.tar", 18), ("train-001.tar", 6), ("t*-00[02].tar", 12)])
def test_patterns(tmp_path, where, expected):
    for i in range(3):
        shard(tmp_path / f"train-{i:03}.tar", range(6 * i, 6 * i + 6))
    shard(tmp_path / "val-000.tar", range(90, 93))
    train, val = sources(f"wds/{where}", data_dir=tmp_path)
    if "val" in where:
        assert (len(train), len(val)) == (expected, 3)
    else:
        assert len(train) + len(val) == expected and not set(found(train)) & set(found(val))
    with pytest.raises(FileNotFoundError, match=r"train-003.tar: no such file"):
        sources("wds/train-{000..003}.tar", data_dir=tmp_path)


def test_shards_in_folders_of_parts(tmp_path):
    shard(tmp_path / "train" / "0.tar", range(6))
    shard(tmp_path / "val" / "0.tar", range(6, 9))
    assert [len(x) for x in sources(f"wds/{tmp_path}")] == [6, 3]


@pytest.mark.parametrize("file,text", [
    ("classes.txt", "no\nyes\n"), ("_info.json", '{"classes": ["no", "yes"]}'),
    ("dataset_info.json", '{"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}')])
def test_names_beside_shards(tmp_path, file, text):
    shard(tmp_path / "a.tar", range(10))
    (tmp_path / file).write_text(text)
    assert sources(f"wds/{tmp_path}")[0].classes == ("no", "yes")


def test_labels_that_are_names(tmp_path):
    shard(tmp_path / "a.tar", range(10), "json", lambda i: ("cat", "ant")[i % 2])
    train, _ = sources(f"wds/{tmp_path}")
    assert train.classes == ("ant", "cat")
    assert found(train.take([0])) == [(picture(i).tobytes(), 1 - i % 2) for i in range(10) if picture(i).tobytes() == contents(train)[0][0]]


@pytest.mark.parametrize("members,said", [
    ({"1.png": png(1)}, r"1.png has no label; expected 1.cls with a number"),
    ({"1.png": png(1), "1.cls": b""}, "has no label"),
    ({"1.png": png(1), "1.cls": b"-1"}, "has no label"),
    ({"1.png": png(1), "1.json": b"{"}, "has no label"),
    ({"1.png": png(1), "1.json": b'{"label": true}'}, "has no label"),
    ({"1.cls": b"3"}, "found no images"),
    ({"1.png": png(1), "1.cls": b"1"}, r"found 1 class \(1\); expected labels of two or more"),
    ({"1.png": png(1), "1.cls": b"1", "2.png": png(2), "2.cls": b"cat"}, "some labels are numbers and some are names"),
])
def test_shard_mistakes(tmp_path, members, said):
    tar(tmp_path / "a.tar", **members)
    with pytest.raises(ValueError, match=said):
        sources(f"wds/{tmp_path}")


def test_tars_that_are_cut_compressed_or_without_labels(tmp_path):
    whole = shard(tmp_path / "a.tar", range(9)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:3000])
    with tarfile.open(tmp_path / "z.tar", "w:gz") as t:
        t.add(tmp_path / "a.tar", "a.tar")
    for name in ("cut.tar", "z.tar"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as a tar .*; expected a whole, uncompressed one"):
            sources(tmp_path / name)
    with pytest.raises(ValueError, match=r"2 picture\(s\) lie in no subfolder, first 1.png; expected one subfolder per class, or in a tar a label"):
        sources(tar(tmp_path / "loose.tar", **{"1.png": png(1), "2.png": png(2)}))


class Opened(Dataset):
    def __init__(self, source): self.source = source
    def __len__(self): return len(self.source)
    def __getitem__(self, i): return np.asarray(self.source.open(i)).copy(), self.source.labels[i]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_two_forked_processes_read_the_same_shard(tmp_path):
    train, _ = sources(shard(tmp_path / "a.tar", range(60)))
    train.open(0)                                             # whatever is open now must not be shared
    at_home = contents(train)
    for _ in range(2):
        loader = DataLoader(Opened(train), 4, num_workers=2, multiprocessing_context="fork")
        assert [(x.numpy().tobytes(), int(l)) for xs, ls in loader for x, l in zip(xs, ls)] == at_home


def test_pickled(tmp_path):
    for source in (*sources(shard(tmp_path / "a.tar", range(10))), *sources(folder(tmp_path / "f", a=4, b=4)), *sources(img_size=8, limit=10)):
        few = source.take([1, 0, -1])
        again = pickle.loads(pickle.dumps(few))
        assert contents(again) == contents(few) and again.classes == few.classes and again.name(2) == few.name(2)


# mistakes

@pytest.mark.parametrize("classes,error,said", [
    ({"train/a": 3, "train/b": 3}, ValueError, "has train/ but no val/; add it, or pass .*train to split it by seed"),
    ({"train/a": 3, "train/b": 3, "val/x": 2}, ValueError, "val: has classes that train/ has not: x"),
    ({"train": 0, "val/x": 2}, ValueError, "train: found no images; expected one subfolder per class with pictures inside"),
    ({"only": 9}, ValueError, r"found 1 class \(only\); expected a subfolder for each"),
    ({"a": 1, "b": 1}, ValueError, r"2 picture\(s\) are too few to split into training and validation"),
    ({}, ValueError, "found no images"),
    ({"": 3, "a": 1, "b": 1}, ValueError, r"3 picture\(s\) lie in no subfolder, first 0.png"),
])
def test_folder_mistakes(tmp_path, classes, error, said):
    with pytest.raises(error, match=said):
        sources(str(folder(tmp_path, **classes)))


@pytest.mark.parametrize("wish,said", [
    (dict(limit=0), "limit: got 0, expected a whole number of at least 1"), (dict(fraction=0.), "fraction: got 0.0, expected a number above 0 and at most 1"),
    (dict(fraction=1.5), "fraction: got 1.5"), (dict(fraction=float("nan")), "fraction: got nan"),
    (dict(limit=3, fraction=.1), "limit and fraction: got 3 and 0.1"), (dict(val_fraction=1.), "val_fraction: got 1.0, expected a number between 0 and 1")])
def test_wishes_out_of_range(wish, said):
    with pytest.raises(ValueError, match=said):
        sources(**wish)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere: no such folder; expected an image folder, or "shapes"'):
        sources("nowhere")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="a.zip: is neither a folder nor a .tar"):
        sources(tmp_path / "a.zip")
    with pytest.raises(FileNotFoundError, match="nowhere: no such file; expected a folder of shards"):
        sources("wds/nowhere")


# parts of them

def test_shapes():
    train, val = sources(img_size=8)
    assert (len(train), len(val)) == (4000, 1000) and len(sources(limit=9000)[0]) == 4000
    few, whole = sources(img_size=8, limit=20)
    assert contents(few) == contents(train.take(range(20))) and len(whole) == 1000
    tenth, _ = sources(img_size=8, fraction=.1)
    assert len(tenth) == 400 and set(np.bincount(tenth.labels)) == {40} and contents(tenth.take([5]))[0] in contents(train)


def test_both_kinds_of_shapes_are_known_by_one_name_everywhere():
    for name in drawn_sets:
        assert is_drawn(name)
        train, val = sources(name, img_size=16, limit=20)
        masks = mask_pairs(name, 16)
        assert train.name(3) == f"{name}/train[3]" and len(masks) == len(val)
        assert np.array_equal(np.asarray(val.open(7)), ((masks[7][0].permute(1, 2, 0) / 2 + .5) * 255).round().byte().numpy())
    several, one = (sources(name, img_size=16, limit=20)[0] for name in drawn_sets)
    assert several.labels == one.labels and contents(several) != contents(one)
    assert not is_drawn("shapes/two") and not is_drawn("./shapes")
    with pytest.raises(FileNotFoundError, match="shapes/two: no such folder"):
        sources("shapes/two")


def test_limit_takes_classes_in_turns(tmp_path):
    root = folder(tmp_path, **{"train/a": 20, "train/b": 6, "train/c": 2, "val/a": 3})
    train, val = sources(root, limit=12)
    assert np.bincount(train.labels).tolist() == [5, 5, 2] and len(val) == 3
    assert contents(sources(root, limit=7)[0]) == contents(train)[:7]


def test_split_keeps_shares_and_depends_on_the_seed_alone(tmp_path):
    root = folder(tmp_path, a=40, b=10)
    train, val = sources(root, seed=1)
    assert np.bincount(train.labels).tolist() == [32, 8] and np.bincount(val.labels).tolist() == [8, 2]
    assert not set(found(train)) & set(found(val)) and len(set(found(train)) | set(found(val))) == 50
    assert contents(sources(root, seed=1, fraction=.5)[1]) == contents(val) != contents(sources(root, seed=2)[1])


def test_the_order_on_the_disk_does_not_matter(tmp_path):
    names = [f"{c}/{i}.png" for c in "ab" for i in range(12)]
    for where, order in (("one", names), ("two", names[::-1])):
        tar(tmp_path / f"{where}.tar", **{n: png(names.index(n)) for n in order})
        for n in order:
            (tmp_path / where / n).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / where / n).write_bytes(png(names.index(n)))
    a, *others = [sources(tmp_path / w, seed=3, fraction=.4) for w in ("one", "two", "one.tar", "two.tar")]
    assert all(contents(x) == contents(y) for b in others for x, y in zip(a, b))


CLASSES = st.lists(st.integers(1, 40), min_size=2, max_size=8)


@settings(deadline=None)
@given(CLASSES, st.integers(0, 99), st.lists(st.floats(.01, 1), min_size=2, max_size=2))
def test_fractions_are_fair_and_nested(counts, seed, fractions):
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    whole = RowSource({"x": list(range(len(labels)))}, 0, labels, range(len(counts)))
    order = _by_share(labels, seed)
    assert sorted(order) == list(range(len(labels))) and np.array_equal(order, _by_share(labels, seed))
    small, large = (whole.take(order[:max(len(counts), round(f * len(labels)))]) for f in sorted(fractions))
    assert set(small.items) <= set(large.items) and set(small.labels) == set(labels)
    kept, n = np.bincount(large.labels), np.array(counts)
    assert ((kept - 1) / n).max() < ((kept + 1) / n).min()    # one share fits every class, within a picture


@settings(deadline=None)
@given(CLASSES, st.integers(0, 99), st.data())
def test_turns_are_even(counts, seed, data):
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    kept = np.bincount([labels[i] for i in _take_turns(labels, seed)[:data.draw(st.integers(1, len(labels)))]], minlength=len(counts))
    short = kept < np.array(counts)
    assert not short.any() or kept[short].min() >= kept.max() - 1


# torchvision, in the layout that it keeps on the disk

def cifar(root, base, files, meta, key, fine=""):
    (root / base).mkdir(parents=True)
    for k, name in enumerate(files):
        rows = np.stack([np.asarray(picture(100 * k + i).resize((32, 32))).transpose(2, 0, 1).reshape(-1) for i in range(10)])
        (root / base / name).write_bytes(pickle.dumps({"data": rows, f"{fine}labels": list(range(10))}))
    (root / base / meta).write_bytes(pickle.dumps({key: [f"kind {i}" for i in range(10)]}))


def test_cifar(tmp_path, monkeypatch):
    cifar(tmp_path, "cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], "batches.meta", "label_names")
    cifar(tmp_path, "cifar-100-python", ["train", "test"], "meta", "fine_label_names", "fine_")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: holds no whole cifar10; pass --download"):
        sources("torch/cifar10", data_dir=tmp_path)           # the sums are wrong
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
    train, val = sources("torch/cifar10", data_dir=str(tmp_path), fraction=.4)
    assert len(train) == 20 and set(np.bincount(train.labels)) == {2} and val.labels == list(range(10)) and train.classes[3] == "kind 3"
    assert val.name(7) == "cifar10/test[7]" and np.array_equal(val.open(7), np.asarray(picture(507).resize((32, 32))))
    assert contents(pickle.loads(pickle.dumps(val.take([1, 2])))) == contents(val)[1:3]
    assert [len(s) for s in sources("torch/cifar100", data_dir=tmp_path)] == [10, 10]
    with pytest.raises(ValueError, match='got part \'val\', expected "train" or "test"'):
        sources("torch/cifar10", data_dir=tmp_path, val_split="val")


def test_pets(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    names = [(f"{breed}_{i}", k) for k, breed in enumerate(("Abyssinian", "american_bulldog", "Bengal"), 1) for i in range(6)]
    for j, (n, _) in enumerate(names):
        picture(j).save(base / "images" / f"{n}.jpg")
    for part, rest in (("trainval", 0), ("test", 1)):
        (base / "annotations" / f"{part}.txt").write_text("".join(f"{n} {k} 1 1\n" for j, (n, k) in enumerate(names) if j % 2 == rest))
    train, val = sources("torch/pets", data_dir=tmp_path)
    assert train.classes == ("Abyssinian", "American Bulldog", "Bengal") and np.bincount(train.labels).tolist() == [3, 3, 3]
    assert val.open(0).size == (10, 8) and val.name(0) == "pets/test[0]"


def test_flowers(tmp_path, monkeypatch):
    savemat = pytest.importorskip("scipy.io").savemat
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for i in range(1, 13):
        picture(i).save(base / "jpg" / f"image_{i:05}.jpg")
    savemat(base / "imagelabels.mat", {"labels": np.array([[1 + i % 2 for i in range(12)]])})
    savemat(base / "setid.mat", {"trnid": np.array([[1, 2, 3, 4]]), "valid": np.array([[5, 6, 7]]), "tstid": np.array([[8, 9, 10, 11, 12]])})
    monkeypatch.setattr(torchvision.datasets.flowers102, "check_integrity", lambda *a: True)
    assert [len(s) for s in sources("torch/flowers102", data_dir=tmp_path)] == [4, 3]
    train, test = sources("torch/Flowers102", data_dir=tmp_path, train_split="train+val", val_split="test")
    assert (len(train), len(test)) == (7, 5) and test.classes[0] in ("pink primrose", "0")
    assert sorted(train.name(i) for i in range(7))[4] == "flowers102/val[0]"
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=re.escape(f"torch/flowers102: needs scipy; {to_install('data')}")):
        sources("torch/flowers102", data_dir=tmp_path)


def test_torch_mistakes(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="torch/mnist: no such set; expected one of torch/cifar10, torch/cifar100, torch/flowers102, torch/pets"):
        sources("torch/mnist", data_dir=tmp_path)
    with pytest.raises(ValueError, match="torch/pets: needs data_dir"):
        sources("torch/pets")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: holds no whole pets; pass --download"):
        sources("torch/pets", data_dir=tmp_path)

    def offline(*args, **kwargs):
        raise OSError("no\n network")
    monkeypatch.setattr(torchvision.datasets.oxford_iiit_pet, "download_and_extract_archive", offline)
    with pytest.raises(OSError, match=r"torch/pets cannot be downloaded there \(no network\)"):
        sources("torch/pets", data_dir=tmp_path, download=True)


# Hugging Face

@pytest.fixture
def hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


def test_hugging_face_folders(tmp_path, hub):
    root = folder(tmp_path / "f", **{"train/b": 6, "train/a": 6, "validation/b": 2})
    ours = sources(root)
    for train, val in (sources("hfds/imagefolder", data_dir=root), sources(f"hfds/{root}", data_dir=tmp_path / "cache")):
        assert train.classes == ("a", "b") and found(train) == found(ours[0]) and contents(val) == contents(ours[1])
        assert contents(pickle.loads(pickle.dumps(train))) == contents(train)
        loader = DataLoader(Opened(train), 4, num_workers=2, multiprocessing_context="fork")
        assert [(x.numpy().tobytes(), int(l)) for xs, ls in loader for x, l in zip(xs, ls)] == contents(train)
    train, val = sources(f"hfds/{folder(tmp_path / 'g', a=10, b=10)}", data_dir=tmp_path / "cache")
    assert (len(train), len(val)) == (16, 4) and len(sources(f"hfds/{root}", data_dir=tmp_path / "cache", train_split="train[25%:75%]")[0]) == 6


def test_hugging_face_columns(tmp_path, hub):
    def saved(name, **columns):
        kinds = {"image": hub.Image(), "coarse": hub.ClassLabel(names=["all", "none"]), "fine": hub.ClassLabel(names=["no", "yes"])}
        features = {k: kinds.get(k, hub.Value("int64" if isinstance(v[0], int) else "string")) for k, v in columns.items()}
        hub.DatasetDict(train=hub.Dataset.from_dict(columns, features=hub.Features(features))).save_to_disk(str(tmp_path / name))
        return f"hfds/{tmp_path / name}"
    pictures = [picture(i) for i in range(10)]
    where = saved("a", image=pictures, fine=[0, 1] * 5, coarse=[0, 1, 1, 1, 1] * 2)
    train, val = sources(where)
    assert train.classes == ("no", "yes") and (len(train), len(val)) == (8, 2) and train.name(0).startswith(f"{where[5:]}/train[")
    assert found(train) == sorted((picture(i).tobytes(), i % 2) for _, i in train.items)
    assert sources(saved("b", image=pictures, label=["cat", "ant"] * 5))[0].classes == ("ant", "cat")
    assert sources(saved("c", image=pictures, labels=[2, 1] * 5))[0].classes == ("0", "1", "2")
    for columns, said in ((dict(image=pictures), r"has no labels; its columns are image \(Image\)"), (dict(label=[1, 0]), "has no pictures"),
                          (dict(image=pictures, fine=[0, -1] * 5), "some pictures have no label"),
                          (dict(image=pictures, fine=[1] * 10), r"found 1 class \(yes\); expected two or more")):
        with pytest.raises(ValueError, match=said):
            sources(saved("d" + str(len(list(tmp_path.iterdir()))), **columns))
    with pytest.raises(ValueError, match="has no part 'test'; expected one of train"):
        sources(where, val_split="test")


def test_hugging_face_is_not_there(tmp_path, hub):
    with pytest.raises(OSError, match="hfds/nobody/nothing: ") as e:
        sources("hfds/nobody/nothing", data_dir=tmp_path)
    assert "\n" not in str(e.value)


def test_hugging_face_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=re.escape(f"needs the package datasets; {to_install('data')}")):
        sources("hfds/beans")


# layouts, as people have them

@pytest.mark.parametrize("train,val", [("Train", "Val"), ("TRAIN", "validation"), ("train", "Valid"), ("Train", "TEST")])
def test_parts_are_known_without_regard_to_case(tmp_path, train, val):
    root = folder(tmp_path / "f", **{f"{train}/a": 3, f"{train}/b": 3, f"{val}/a": 2, "extra/a": 4})
    with tarfile.open(tmp_path / "all.tar", "w") as t:
        t.add(root, "")
    for where in (root, tmp_path / "all.tar"):
        one, two = sources(where)
        assert (len(one), len(two)) == (6, 2) and one.classes == ("a", "b")
        assert any("left out 4 picture(s) beside" in n and "extra/ (4)" in n for n in one.notes)
        assert (val == "TEST") == any("has no val/; TEST/ is taken for validation" in n for n in one.notes)


def test_two_parts_of_one_name(tmp_path):
    root = folder(tmp_path, **{"Train/a": 3, "TRAIN/b": 3, "val/a": 2})
    if len(list(root.iterdir())) == 3:                            # not where case does not count
        with pytest.raises(ValueError, match="has TRAIN/ and Train/; expected one of them"):
            sources(root)
    folder(tmp_path, **{"train/a": 1, "train/b": 2})
    assert len(sources(root)[0]) == 3                            # the very name is one


@pytest.mark.parametrize("classes,said", [
    ({"cat/2021": 3, "dog/2021": 3}, "cat/2021/ and in dog/2021/, which have one name"),
    ({"cat/2021": 3, "cat/2022": 3, "dog": 3}, "dog/ and in cat/202./, at different depths"),
    ({"cat": 3, "cat/old": 3, "dog": 3}, "at different depths"),
    ({"train/x/cat": 3, "train/y/cat": 3, "val/x/cat": 3}, "train: pictures lie in x/cat/ and in y/cat/"),
    ({"pets/train/cat": 3, "pets/val/cat": 3}, "pets/train/cat/ and in pets/val/cat/"),
    ({"val/cat": 3, "test/cat": 3}, "has val/ but no train/"),
    ({"train": 3, "val": 3}, r"train: 3 picture\(s\) lie in no subfolder"),
])
def test_ambiguous_layouts_are_refused(tmp_path, classes, said):
    root = folder(tmp_path / "f", **classes)
    with tarfile.open(tmp_path / "all.tar", "w") as t:
        t.add(root, "")
    for where in (root, tmp_path / "all.tar") if "pets" not in said else (root,):
        with pytest.raises(ValueError, match=said):
            sources(where)


def test_layouts_that_are_plain_or_said(tmp_path):
    train, _ = sources(folder(tmp_path / "a", **{"animals/cat": 4, "things/car": 4}))
    assert train.classes == ("car", "cat")
    assert any("the classes lie in 2 folders (animals, things); the innermost folder is taken" in n for n in train.notes)
    train, _ = sources(folder(tmp_path / "b", **{"pets/cat": 4, "pets/dog": 4}))
    assert train.classes == ("cat", "dog") and not train.notes
    train, _ = sources(folder(tmp_path / "c", car=4, train=4, bus=4))
    assert train.classes == ("bus", "car", "train")


def test_every_kind_that_pillow_reads_and_a_count_of_the_rest(tmp_path):
    root = folder(tmp_path, a=0, b=0)
    for i, kind in enumerate(("ppm", "gif", "webp", "tif", "jp2", "tga", "pcx", "bmp", "JPG")):
        for c in "ab":
            picture(i).save(root / c / f"{i}.{kind}")
    for name in ("a/1.txt", "b/2.txt", "a/3.npy", "README", "a/.DS_Store", ".git"):
        (root / name).write_text("x")
    train, val = sources(root)
    assert len(train) + len(val) == 18 and all(val.open(i).size == (10, 8) for i in range(len(val)))
    assert train.notes == val.notes == (f"{root}: passed over 4 thing(s) that are no pictures: 2 × .txt, 1 × .npy, 1 × file without an ending",) or \
        "2 × .txt" in train.notes[0] and "1 × .npy" in train.notes[0] and "passed over 4" in train.notes[0]
    with pytest.raises(ValueError, match=r"found no images; .* \(passed over: 2 × .txt\)"):
        sources(text(tmp_path / "t"))


def text(root):
    for c in "ab":
        (root / c).mkdir(parents=True)
        (root / c / "1.txt").write_text("x")
    return root


def test_runs_in_the_data_are_left_out(tmp_path, monkeypatch):
    root = folder(tmp_path, **{"a": 5, "b": 5, "runs/1/pictures": 3, "old/2/pictures": 2, "out": 2})
    for r in ("runs/1", "old/2"):
        (root / r / "config.yaml").write_text("epochs: 1")
    (root / "config.yaml").write_text("the data's own")
    monkeypatch.chdir(root)
    for where in (root, "."):
        train, val = sources(where, leave_out=["out"])
        assert train.classes == ("a", "b") and len(train) + len(val) == 10 and "3 × folder of runs" in train.notes[-1]
    assert len(sources(root, leave_out=[root, "nowhere"])[0].classes) == 3      # what is named is never left out itself


def test_links_are_followed_once(tmp_path):
    root = folder(tmp_path / "f", a=4, b=4)
    folder(tmp_path, elsewhere=3)
    (root / "c").symlink_to(tmp_path / "elsewhere")
    for c in "ab":
        for k in range(3):
            (root / c / f"up{k}").symlink_to(root)               # loops, in all their combinations
    (root / "self").symlink_to(root / "self")
    (root / "a" / "gone.png").symlink_to("nowhere")
    (root / "b" / "one.png").symlink_to(root / "a" / "0.png")
    train, val = sources(root)
    assert train.classes == ("a", "b", "c") and len(train) + len(val) == 12
    assert "6 × link to a folder that is there already" in train.notes[0] and "2 × link to nothing" in train.notes[0]


def test_pipes_and_devices_are_passed_over(tmp_path):
    import os
    root = folder(tmp_path, a=5, b=5)
    os.mkfifo(root / "a" / "pipe.png")
    (root / "b" / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(root / "shard.tar")
    train, val = sources(root)
    assert len(train) + len(val) == 10 and "3 × pipe, socket or device" in train.notes[0]
    with pytest.raises(ValueError, match="is neither a folder nor a .tar"):
        sources(root / "shard.tar")
    train.items[0] = ("a/pipe.png", None, 0, -1)                  # it became one since
    with pytest.raises(OSError, match="a/pipe.png: is a pipe, not a file"):
        train.open(0)


def test_a_class_that_may_not_be_listed_is_an_error(tmp_path, monkeypatch):
    import os
    root, real = folder(tmp_path, a=5, b=5, c=5, **{"lost+found": 1}), os.scandir

    def scandir(where):
        if str(where).endswith(("/b", "lost+found")):
            raise PermissionError(13, "Permission denied", str(where))
        return real(where)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match=r"/b: cannot be listed \(Permission denied\); make it readable, or move it away"):
        sources(root)


# tars and shards, as people have them

def test_links_in_tars(tmp_path):
    root = folder(tmp_path / "f", **{"train/a": 10, "train/b": 10, "val/a": 1})
    (root / "val" / "b").mkdir()
    import os
    for i in range(5):
        os.link(root / "train/a" / f"{i}.png", root / "val/a" / f"h{i}.png")
        (root / "val/b" / f"s{i}.png").symlink_to(f"../../train/b/{i}.png")
    (root / "val/b" / "x.png").symlink_to("/etc/nowhere.png")
    (root / "val/b" / "l1.png").symlink_to("l2.png")
    (root / "val/b" / "l2.png").symlink_to("l1.png")
    with tarfile.open(tmp_path / "all.tar", "w") as t:
        t.add(root, "")
    for name in ("x", "l1", "l2"):
        (root / "val/b" / f"{name}.png").unlink()
    ours, unpacked = sources(tmp_path / "all.tar"), sources(root)
    assert [contents(s) for s in ours] == [contents(s) for s in unpacked] and len(ours[1]) == 11
    assert "3 × link to no file in its tar" in ours[0].notes[0]
    assert sorted(n for n in map(ours[1].name, range(11)) if "/s" in n)[0] == "all.tar:val/b/s0.png"


def test_of_a_name_that_comes_twice_the_last_counts(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as t:
        for i, name in enumerate(["a/1.png", "b/1.png", "a/2.png", "b/2.png", "a/1.png"]):
            info = tarfile.TarInfo(name)
            info.size = len(png(i))
            t.addfile(info, io.BytesIO(png(i)))
    train, val = sources(tmp_path / "a.tar")
    assert len(found(train) + found(val)) == 4 and (picture(0).tobytes(), 0) not in found(train) + found(val)


def test_keys_with_dots(tmp_path):
    plain = {k: v for i in range(10) for k, v in ((f"{i}.png", png(i)), (f"{i}.cls", b"%d" % (i % 2)))}
    dotted = {k: v for i in range(10, 20) for k, v in ((f"IMG_1.{i}.png", png(i)), (f"IMG_1.{i}.cls", b"%d" % (i % 2)))}
    further = {f"{i}.seg.png": png(50) for i in range(10)}
    train, val = sources(f"wds/{tar(tmp_path / 'a.tar', **plain, **dotted, **further)}")
    assert sorted(found(train) + found(val)) == sorted((picture(i).tobytes(), i % 2) for i in range(20))
    for members, said in (({"x7.left.png": png(1), "x7.right.png": png(2), "x7.cls": b"1"},
                           "x7.left.png is no sample's picture; .* its key is x7; expected x7.jpg"),
                          ({"v1.5/x.2.png": png(1), "v1.5/x.cls": b"1"}, "its key is v1.5/x; expected")):
        with pytest.raises(ValueError, match=said):
            sources(f"wds/{tar(tmp_path / 'b.tar', **{**plain, **members})}")


@pytest.mark.parametrize("name", ["v [2]", "{a,b}", "what?", "*", "[0-9]{1..3}"])
def test_folders_with_characters_of_patterns(tmp_path, name):
    root = tmp_path / name
    for i in range(3):
        shard(root / f"s-{i:03}.tar", range(6 * i, 6 * i + 6))
    shard(tmp_path / "v 2" / "s-000.tar", range(6))           # what a pattern would find instead
    for where, n in (("s-{000..001}.tar", 12), ("s-*.tar", 18), ("s-00[02].tar", 12), ("s-{2..0}.tar", 0), ("", 18)):
        if n == 0:
            with pytest.raises(FileNotFoundError, match="s-2.tar: no such file"):
                sources(f"wds/{name}/{where}", data_dir=tmp_path)
        else:
            assert sum(map(len, sources(f"wds/{name}/{where}", data_dir=tmp_path))) == n, where
    (root / "s-002.tar").rename(root / "t{1}[x].tar")
    assert sum(map(len, sources(f"wds/{root}/t{{1}}[x].tar"))) == 6


@pytest.mark.parametrize("file,text,said", [
    ("info.json", "[1, 2]", "info.json: holds list where 'classes' is looked for; expected"), ("info.json", '{"classes": 3}', "class names are 3"),
    ("_info.json", '{"classes": {"a": 0}}', "expected a list of texts"), ("info.json", '{"features": {"label": 3}}', "holds int where 'names'"),
    ("dataset_info.json", '{"features": ["x"]}', "holds list where 'label'"), ("info.json", "{", "info.json: cannot be read"),
    ("info.json", "[" * 100000, "info.json: cannot be read"), ("classes.txt", b"\xff\xfe\x00", "classes.txt: not UTF-8")])
def test_files_beside_shards_of_the_wrong_kind(tmp_path, file, text, said):
    shard(tmp_path / "a.tar", range(10))
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=said) as e:
        sources(f"wds/{tmp_path}")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("label", [10**9, 10**12, 10**6])
def test_labels_that_are_no_classes(tmp_path, label):
    with pytest.raises(ValueError, match=f"has label {label}, expected numbers below 1,000,000; number the classes 0, 1, 2"):
        sources(shard(tmp_path / "a.tar", range(9), label=lambda i: i % 2 * label))


def test_labels_of_five_thousand_digits(tmp_path):
    with pytest.raises(ValueError, match=r"has no label \(its .cls holds .999.*\); expected"):
        sources(shard(tmp_path / "a.tar", range(9), label=lambda i: "9" * 5000))


@pytest.mark.parametrize("name,said", [("", "data: got no name"), ("wds/", "wds/: got no name"), ("hfds/", "hfds/: got no name"),
                                       ("hfds//", "hfds/: got no name"),
                                       ("torch/", "torch/: no such set"), ("wds/a-{0..99999999}.tar", "too many; expected at most a million shards")])
def test_names_of_nothing(name, said):
    if name.startswith("hfds"):
        pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=said):
        sources(name)


# what is measured

def test_what_was_drawn_by_seed_is_known_again(tmp_path):
    root = folder(tmp_path / "p", a=10, b=10)
    learned, drawn = sources(root, seed=1)
    kept, names = names_digest(drawn), set(contents(learned))
    assert names_digest(sources(root, seed=1, limit=4)[1]) == kept != names_digest(sources(root, seed=2)[1])
    check_drawn(drawn, kept, "p")
    check_drawn(drawn, None, "p")                                       # of a run of an earlier version
    picture = next((root / "a").iterdir())
    picture.with_name("0" + picture.name).write_bytes(picture.read_bytes()[:-1] + b"x")
    again = sources(root, seed=1)[1]
    assert set(contents(again)) & names                                 # the leak
    with pytest.raises(ValueError, match="^p: its pictures are not those of the training"):
        check_drawn(again, kept, "p")
    assert names_digest(sources(folder(tmp_path / "w", **{"train/a": 3, "train/b": 3, "val/a": 2}))[1]) is None
    assert names_digest(sources("shapes", img_size=8)[1]) is None


@pytest.mark.parametrize("wish,n", [(dict(limit=6), 6), (dict(fraction=.5), 8), ({}, 16)])
def test_training_pictures_are_measured_as_they_are_trained_on(tmp_path, wish, n):
    train, second = sources(folder(tmp_path / "w", a=10, b=10), split="train", seed=3, **wish)
    assert len(train) == len(second) == n and second.part == "train"
    assert [train.name(i) for i in range(n)] == [second.name(i) for i in range(n)]


@pytest.mark.parametrize("split,parted,whole", [("val", 2, 4), ("train", 6, 16), ("all", 8, 20), ("auto", 2, 20)])
def test_what_is_named_is_measured(tmp_path, split, parted, whole):
    root = folder(tmp_path / "p", **{"train/a": 3, "train/b": 3, "val/a": 2})
    apart = folder(tmp_path / "w", a=10, b=10)
    assert [len(s) for s in sources(root, split=split)] == [6, parted]
    train, found_ = sources(apart, split=split)
    assert len(found_) == whole and found_.part == (split if split != "auto" else "all")
    assert len(set(contents(found_))) == whole and pickle.loads(pickle.dumps(found_)).name(0) == found_.name(0)
    with pytest.raises(ValueError, match='split: got "?\'?test'):
        sources(apart, split="test")


def test_turned_photographs_are_turned_wherever_they_lie(tmp_path, monkeypatch):
    note = Image.Exif()
    note[0x0112] = 6
    out = io.BytesIO()
    picture(3).save(out, "PNG", exif=note)
    upright = picture(3).transpose(Image.Transpose.ROTATE_270)
    members = {f"{c}/{i}.png": out.getvalue() for c in "ab" for i in range(3)}
    for name, data in members.items():
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(data)
    tar(tmp_path / "t.tar", **members)
    tar(tmp_path / "s.tar", **{k: v for i in range(6) for k, v in ((f"{i}.png", out.getvalue()), (f"{i}.cls", b"%d" % (i % 2)))})
    places = [tmp_path / "f", tmp_path / "t.tar", tmp_path / "s.tar"]
    for where in places:
        assert all(np.array_equal(s.open(0), upright) for s in sources(where)), where
    base = tmp_path / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    for part in ("trainval", "test"):
        for k in (1, 2):
            (base / "images" / f"{part}_{k}.jpg").write_bytes(out.getvalue())
        (base / "annotations" / f"{part}.txt").write_text("".join(f"{part}_{k} {k} 1 1\n" for k in (1, 2)))
    assert all(np.array_equal(s.open(0), upright) for s in sources("torch/pets", data_dir=tmp_path))


def test_hugging_face_goes_through_the_same_door(tmp_path, hub):
    note = Image.Exif()
    note[0x0112] = 6
    for i in range(4):
        for c in "ab":
            (tmp_path / "f" / c).mkdir(parents=True, exist_ok=True)
            deep = Image.fromarray(np.arange(80, dtype=np.uint16).reshape(8, 10) * 800)
            (deep if i % 2 else picture(i)).save(tmp_path / "f" / c / f"{i}.png", exif=note)
    ours, theirs = (found(s) + found(v) for s, v in (sources(tmp_path / "f"), sources(f"hfds/{tmp_path / 'f'}", data_dir=tmp_path / "cache")))
    assert sorted(ours) == sorted(theirs) and len(set(ours)) > 3
