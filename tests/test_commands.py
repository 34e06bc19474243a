"""The installed command, as typed."""
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from runs import quick

import spatial_entropy as se

COMMAND = Path(sys.executable).with_name("spatial-entropy")


def run(*args, cwd=None):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(COMMAND), *map(str, args)], cwd=cwd, capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "An image folder of 60 pictures in 3 classes, two of them broken, with masks for eight."
    root, data = tmp_path_factory.mktemp("photos"), se.shapes(300)
    for i in range(20):
        for c in range(3):
            p = root / "all" / data.classes[c] / f"{i}.png"
            p.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data.images[10 * i + c]).save(p)
    (root / "all" / data.classes[0] / "0.png").write_bytes(b"no picture")
    whole = (root / "all" / data.classes[1] / "1.png").read_bytes()
    (root / "all" / data.classes[1] / "1.png").write_bytes(whole[:len(whole) // 2])
    for kind in ("images", "masks"):
        (root / "pairs" / kind).mkdir(parents=True)
    for i in range(8):
        Image.fromarray(data.images[i]).resize((90, 70)).save(root / "pairs" / "images" / f"{i}.jpg")
        Image.fromarray(data.masks[i]).resize((90, 70)).save(root / "pairs" / "masks" / f"{i}.png")
    return root


def line_of(photos, output):
    return ("train", "--data", photos / "all", "--epochs", 2, "-b", 16, "--limit", 32, "-j", 2, "--img-size", 32, "--output", output, "--experiment", "r",
            "--model-kwargs", "depth=2")


@pytest.fixture(scope="module")
def trained(photos):
    "A run of two epochs of two steps on the folder."
    said = run(*line_of(photos, photos / "runs"), cwd=photos)
    assert said.returncode == 0, said.stderr
    return photos / "runs" / "r", said.stdout


def test_training_on_a_folder(trained):
    run_, said = trained
    assert sorted(p.name for p in run_.iterdir()) == sorted([
        "attention.gif", "before_after.png", "best.safetensors", "checkpoints", "config.yaml", "curves.png", "evaluation.json", "facts.json", "metrics.csv",
        "model.safetensors", "pictures"])
    lines = (run_ / "metrics.csv").read_text().splitlines()
    assert len(lines) == 3 and float(lines[1].split(",")[2]) == 0 and float(lines[2].split(",")[2]) > 0
    facts, config = json.loads((run_ / "facts.json").read_text()), yaml.safe_load((run_ / "config.yaml").read_text())
    assert config["limit"] == 32 and facts["versions"]["torch"] and len(facts["classes"]) == 3
    assert np.asarray(Image.open(run_ / "before_after.png")).std() > 10
    assert "could not be read and were left out" in said and ".png" in said


def test_stock_timm_loads_the_weights(trained):
    config = yaml.safe_load((trained[0] / "config.yaml").read_text())
    model = timm.create_model(config["model"], img_size=32, num_classes=3, checkpoint_path=str(trained[0] / "model.safetensors"), **config["model_kwargs"])
    ours, _, facts = se.load_run(trained[0])
    x = torch.rand(2, 3, 32, 32)
    assert not torch.equal(model(x), ours(x))            # stock timm knows no surgery …
    with se.drop_last_skip(model):
        assert torch.equal(model.eval()(x), ours(x))     # … and is the same model after it


def test_evaluate_with_masks(trained, photos, capsys):
    out = photos / "scores.json"
    code, said, err = typed(capsys, "evaluate", trained[0], "--masks", photos / "pairs", "-o", out)
    assert code == 0, err
    scores = json.loads(out.read_text())
    assert scores["mask_pairs"] == 8 and 0 <= scores["jaccard_mean_head"] <= scores["jaccard_best_head"] <= 1 and "Jaccard" in said
    assert scores["pictures"] in (10, 11, 12)            # 12 of 60 are for validation, of which up to two are broken


@pytest.mark.parametrize("block", [0, -1])
def test_draw(trained, photos, block, capsys):
    out = photos / f"out{block}.png"
    line = "draw", trained[0], photos / "pairs" / "images" / "0.jpg", photos / "pairs" / "images" / "1.jpg", "-o", out, "--block", block
    assert typed(capsys, *line)[0] == 0
    assert np.asarray(Image.open(out)).std() > 10


def test_draw_of_the_demo_model_and_a_folder(photos, tmp_path, capsys):
    code, said, err = typed(capsys, "draw", "demo", photos / "pairs" / "images", "-o", tmp_path / "out.png")
    assert code == 0 and not err and "8 picture(s), 3 heads, 14×14 patches" in said


@pytest.mark.parametrize("line,said", [
    ("train --lambda 0.03", "spatial-entropy train: unrecognized arguments: --lambda 0.03; did you mean --entropy-weight? See spatial-entropy train --help"),
    ("train --epochz=3", "did you mean --epochs? See"), ("trian --epochs 3", "did you mean train? See spatial-entropy --help"),
    ("train --recipe papr", "did you mean paper? See"), ("train --qqq", "--qqq; see spatial-entropy --help"),
])
def test_what_was_meant_is_said(line, said, capsys):
    from spatial_entropy.commands import main
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1


def test_same_seed_same_weights(trained, photos, tmp_path, monkeypatch, capsys):
    "The line that `trained` gave to a program of its own, in this process."
    monkeypatch.chdir(photos)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with quick():
            assert typed(capsys, *line_of(photos, tmp_path))[0] == 0
    finally:
        torch.set_num_threads(threads)
    from safetensors.torch import load_file
    a, b = (load_file(folder / "model.safetensors") for folder in (trained[0], tmp_path / "r"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("line,said", [
    ("train --data nowhere", "nowhere: no such folder"),
    ("train --data empty", "empty: found no images"),
    ("train --model vit_tinny_patch16_224", "does not know; near: vit_tiny_patch16_224"),
    ("train --model resnet18", "ResNet (ResNet): a convolutional network: no attention"),
    ("train --img-size 60", "img_size: got 60, expected a multiple of the patch size 8"),
    ("train --output file/inside", "no run folder can be made in file/inside"),
    ("train --epochs 0", "epochs: got 0, expected from 1 to 1,000,000"),
    ("train --lr -1", "lr: got -1.0, expected above 0, at most 1,000"),
    ("train --opt sdg", "opt: got 'sdg'"),
    ("train --limit 8 -b 32", "batch_size: got 32, but there are 8 training pictures"),
    ("train --limit 32 --device gpu", "device"),
    ("evaluate nowhere", "nowhere: not a run folder"),
    ("evaluate RUN --masks lonely", "1 mask(s) without an image, first b.png"),
    ("evaluate RUN --masks nowhere", "no such folder"),
    ("evaluate RUN --data other", "are not the 3 that the run was trained on"),
    ("evaluate RUN -o no/where.json", "no such folder to write where.json into"),
    ("draw RUN nowhere.png -o a.png", "nowhere.png: no such file"),
    ("draw RUN file -o a.png", "file: not a picture that can be read"),
    ("draw RUN lonely/images/a.png -o a.txt", "expected .png, .pdf or .svg"),
    ("draw nothing lonely/images/a.png -o a.png", "does not know"),
    ("draw vit_tiny_patch16_224 lonely/images/a.png -o a.png --checkpoint no.pth", "no.pth: no such file of weights"),
    ("draw vit_tiny_patch16_224 lonely/images/a.png -o a.png --checkpoint file", "file: weights for vit_tiny_patch16_224 that cannot be read ("),
    ("draw vit_tiny_patch16_224 lonely/images/a.png -o a.png --checkpoint RUN/model.safetensors", "do not fit: they have no blocks."),
    ("draw RUN empty -o a.png", "empty: no picture in it; expected files such as .png or .jpg"),
    ("draw dmeo lonely/images/a.png -o a.png", "dmeo: no run folder and no model of timm; did you mean demo?"),
    ("draw RUN lonely/images/a.png -o a.png --img-size 100", "img_size: got 100, but RUN has a size and weights of its own"),
    ("explore demo --checkpoint no.pth", "checkpoint: got no.pth, but demo has a size and weights of its own"),
    ("draw RUN lonely/images/a.png -o a.png --block 7", "block: got 7, expected a number from -2 to 1"),
])
def test_a_mistake_is_one_sentence_and_writes_nothing(line, said, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained[0], "RUN")
    for folder in ("empty/a", "lonely/images", "lonely/masks", "other/x", "other/y"):
        Path(folder).mkdir(parents=True)
    Path("file").write_text("text")
    for p in ["lonely/images/a.png", "lonely/masks/a.png", "lonely/masks/b.png", *(f"other/{c}/{i}.png" for c in "xy" for i in range(20))]:
        Image.new("RGB", (32, 32)).save(p)
    before = {p: p.stat().st_mtime_ns for p in sorted(Path(".").rglob("*"))}
    from spatial_entropy.commands import main
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "Traceback" not in err
    assert {p: p.stat().st_mtime_ns for p in sorted(Path(".").rglob("*"))} == before


@pytest.mark.parametrize("line", ["--help", "train --help", "evaluate --help", "draw --help"])
def test_help_is_answered_without_what_takes_long(line):
    "Half of the time went into numpy, before it was imported only where it is used."
    code = (f"import sys; from spatial_entropy.commands import main\ntry: main({line.split()!r})\n"
            "except SystemExit: print({'torch', 'timm', 'numpy', 'psutil', 'PIL', 'importlib.metadata'} & {*sys.modules}, file=sys.stderr)")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stderr == "set()\n" and "usage: spatial-entropy" in said.stdout


def test_a_typing_mistake_is_exit_code_2():
    said = run("train", "--epoch-s", 3)
    assert said.returncode == 2 and "Traceback" not in said.stderr


# pictures, as people have them

def typed(capsys, *line):
    from spatial_entropy.commands import main
    code = main([str(w) for w in line])
    return code, *capsys.readouterr()


def test_what_is_named_is_measured_whole(trained, photos, tmp_path, capsys):
    data, heldout = se.shapes(300), tmp_path / "[bold]held[/b]out"
    for c in range(3):
        (heldout / data.classes[c]).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(data.images[100 + 10 * i + c]).save(heldout / data.classes[c] / f"{i}.png")
    (heldout / "notes.txt").write_text("x")
    out = tmp_path / "scores.json"
    for options, pictures, part in (((), 15, "all"), (("--split", "val"), 3, "val"), (("--split", "train"), 12, "train")):
        code, said, _ = typed(capsys, "evaluate", trained[0], "--data", heldout, "-o", out, *options)
        scores = json.loads(out.read_text())
        assert (code, scores["pictures"], scores["split"]) == (0, pictures, part)
        assert "[bold]held[/b]out" in said.replace("\n", "") and "passed over 1 thing(s) that are no pictures: 1 × .txt" in said
    for options, part in ((("--data", photos / "all"), "val"), ((), "val"), (("--split", "all"), "all")):
        assert typed(capsys, "evaluate", trained[0], "-o", out, *options)[0] == 0
        scores = json.loads(out.read_text())
        assert scores["split"] == part and scores["pictures"] + len(scores["skipped"]) == (12 if part == "val" else 60)


def header_of(side):
    import struct
    import zlib
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"0"))


def test_draw_of_odd_names_and_hostile_files(trained, tmp_path, capsys):
    photo = Image.fromarray(se.shapes(300).images[0])
    names = ["cost_$5_and_$6^", "$\\frac{$", "a\nb", "日本", "x" * 200, "[bold]", "[b]x"]
    for n in names:
        photo.save(tmp_path / f"{n}.png")
    for kind in ("png", "svg", "pdf"):
        code, said, err = typed(capsys, "draw", trained[0], *(tmp_path / f"{n}.png" for n in names), "-o", tmp_path / f"out.{kind}")
        assert code == 0 and not err and "7 picture(s)" in said and (tmp_path / f"out.{kind}").stat().st_size > 1000
    (tmp_path / "huge.png").write_bytes(header_of(20000))
    (tmp_path / "cut.png").write_bytes((tmp_path / "[bold].png").read_bytes()[:200])
    os.mkfifo(tmp_path / "pipe.png")
    for name, said in (("huge", "has more pixels than Pillow decodes"), ("cut", "cannot be decoded"), ("pipe", "is a pipe, not a file")):
        code, _, err = typed(capsys, "draw", trained[0], tmp_path / f"{name}.png", "-o", tmp_path / "no.png")
        assert code == 2 and err.count("\n") == 1 and said in err and not (tmp_path / "no.png").exists()
    code, _, err = typed(capsys, "draw", trained[0], *[tmp_path / "[bold].png"] * 400, "-o", tmp_path / "no.png")
    assert code == 2 and err.count("\n") == 1 and "images: got 400, expected at most 330" in err


def test_masks_that_hold_0_and_1(trained, photos, tmp_path, capsys):
    scores = {}
    for name, change in (("255", lambda a: a * 255), ("1", lambda a: a), ("0", lambda a: a * 0)):
        shutil.copytree(photos / "pairs" / "images", tmp_path / name / "images")
        (tmp_path / name / "masks").mkdir()
        for p in (photos / "pairs" / "masks").iterdir():
            Image.fromarray(change((np.asarray(Image.open(p)) > 0).astype(np.uint8))).save(tmp_path / name / "masks" / p.name)
        code, _, err = typed(capsys, "evaluate", trained[0], "--masks", tmp_path / name, "-o", tmp_path / "scores.json")
        if name == "0":
            assert code == 2 and "there is no foreground in its 8 mask(s)" in err and err.count("\n") == 1
        else:
            scores[name] = json.loads((tmp_path / "scores.json").read_text())["jaccard_mean_head"]
    assert scores["1"] == scores["255"] > 0


def test_runs_lie_in_the_data(photos, tmp_path, monkeypatch, capsys):
    shutil.copytree(photos / "all", tmp_path / "photos")
    monkeypatch.chdir(tmp_path / "photos")
    small = ("--epochs", 1, "--limit", 16, "-b", 8, "--img-size", 16, "-j", 0, "--model-kwargs", "depth=2", "embed_dim=24", "num_heads=2", "patch_size=8")
    for k in (1, 2):
        with quick():
            code, said, err = typed(capsys, "train", "--data", ".", "--experiment", f"r{k}", *small)
        assert code == 0, err
        assert len(json.loads(Path(f"runs/r{k}/facts.json").read_text())["classes"]) == 3
        assert said.count("1 × folder of runs") >= k             # found by the second run, and by each one's evaluation


def test_the_sequence_at_the_top_of_the_page_leaves_what_it_says(photos, tmp_path, monkeypatch, capsys):
    "The commands of page 80, made small; under each stands what it leaves."
    cells = json.loads((Path(__file__).parent.parent / "nbs" / "80_commands.ipynb").read_text(encoding="utf-8"))["cells"]
    text = next(s for c in cells if "## From pictures to maps" in (s := "".join(c["source"])))
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(photos / "all")
    Path("masked").symlink_to(photos / "pairs")
    shutil.copy(photos / "pairs" / "images" / "0.jpg", "picture.png")
    small = "--epochs 1 --limit 16 -b 8 -j 0 --img-size 16 --model-kwargs depth=1 embed_dim=24 num_heads=2 patch_size=8".split()
    commands = 0
    for line in text.split("```sh\n")[1].split("```")[0].splitlines():
        if line.startswith("#"):
            where, colon, names = line[1:].partition(":")
            folder = Path(where.strip().replace("here", "."))
            missing = [n for n in names.split() if not (folder / n).exists()]
            assert not missing, (line, missing)
            continue
        words = line.split()[1:]
        with quick() if words[0] == "train" else nullcontext():
            code, said, err = typed(capsys, *words, *(small if "--data" in words else ["--epochs", 2] if "--epochs" in words else []))
        assert code == 0, err
        commands += 1
    assert commands == 5 and "runs/first exists (finished): this is first-2" in said


def test_a_flag_of_several_values_can_be_given_twice():
    from spatial_entropy.commands import _parser
    of = lambda *line: _parser().parse_args(line)
    twice = of("train", "--model-kwargs", "depth=2", "fc_norm=None", "--model-kwargs", "patch_size=8", "--trackers", "csv", "--trackers", "json")
    assert twice.model_kwargs == [("depth", 2), ("fc_norm", None), ("patch_size", 8)] and twice.trackers == ["csv", "json"]
    assert of("evaluate", "r", "--corruptions", "fog", "--corruptions", "snow").corruptions == ["fog", "snow"]
    asked = of("look", "demo", "a.png", "-p", "?", "--heads", "1.2", "--layers", "1", "--heads", "0.3", "--layers", "0")
    assert asked.heads == ["1.2", "0.3"] and asked.layers == [1, 0]
