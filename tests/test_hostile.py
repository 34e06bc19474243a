"""Whatever arrives: one sentence and exit code 2, or it works; nothing else changes.

HOSTILE_TIMES=20 multiplies the number of examples and draws them at random; the suite's are always
the same.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import string
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_type_hints
from unittest.mock import patch

import loss as loss_benchmark
import numpy as np
import pytest
import training as training_benchmark
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import spatial_entropy.training.loop
from spatial_entropy import commands
from spatial_entropy.commands import main
from spatial_entropy.training.config import TrainConfig, configure, load_config, plain_type, save_config

TIMES = int(os.environ.get("HOSTILE_TIMES", 1))
GIB = 2**30
tiny = {
    "limit": 8,
    "batch_size": 4,
    "img_size": 16,
    "epochs": 1,
    "warmup_epochs": 0,
    "output": "out",
    "device": "cpu",
    "workers": 0,
    "model_kwargs": {"depth": 1, "embed_dim": 12, "num_heads": 1, "patch_size": 8},
}


def examples(n):
    return settings(
        max_examples=n * TIMES,
        deadline=None,
        database=None,
        derandomize=TIMES == 1,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.function_scoped_fixture,
            HealthCheck.data_too_large,
        ],
    )


# Values

hints = {f.name: plain_type(get_type_hints(TrainConfig)[f.name]) for f in fields(TrainConfig)}
texts = st.one_of(
    st.sampled_from(
        [
            "",
            " ",
            ".",
            "..",
            "../up",
            "photos",
            "file",
            "empty",
            "nowhere",
            "run",
            "run/facts.json",
            "photos/cat",
            "shapes",
            "torch/cifar10",
            "torch/",
            "hfds/",
            "wds/",
            "wds/*",
            "a.tar",
            "inf",
            "nan",
            "null",
            "-1",
            "0",
            "True",
            "foo",
            "meta",
            "cuda:99",
            "cpu",
            "none",
            "auto",
            "/dev/null",
            "/dev/zero",
            "[bold]",
            "[/b]",
            "a\nb",
            "a\x1b[2J",
            "a\x00b",
            "\ud800",
            "\u202eevil",
            "é",
            "💥" * 50,
            "x" * 300,
            "x" * 5000,
            "*",
            "[a]",
            "{000..003}.tar",
            "{",
            "$HOME",
            "%s",
            "9" * 5000,
            "a=b",
            "resnet18",
            "test_vit",
            "vit_tiny_patch16_224.nope",
            "adahessian",
            "sgd",
            "lookahead_adam",
            "rand-m9",
            "rand-m9-foo9",
            "augmix-a0",
            "original",
            "bilinear",
            "tensorboard",
            "abacus",
        ]
    ),
    st.text(max_size=20),
)
numbers = st.one_of(
    st.sampled_from(
        [
            0,
            1,
            2,
            -1,
            0.5,
            1e-300,
            -0.0,
            1e308,
            float("inf"),
            float("-inf"),
            float("nan"),
            2**31,
            2**63,
            2**64,
            10**30,
            -(10**30),
            65537,
        ]
    ),
    st.integers(-5, 40),
    st.floats(width=32),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts, st.dates(), st.binary(max_size=5))
values = st.recursive(
    leaves,
    lambda v: st.one_of(
        st.lists(v, max_size=3), st.dictionaries(st.one_of(texts, st.integers()), v, max_size=3)
    ),
    max_leaves=5,
)
names = st.one_of(st.sampled_from(sorted(hints)), st.sampled_from(sorted(hints)), texts)
few = st.dictionaries(names, values, max_size=3)


def one_line(said):
    return (
        said.strip()
        and said.count("\n") <= 1
        and "Traceback" not in said
        and not any(ord(c) < 32 for c in said.strip())
    )


@contextlib.contextmanager
def two_gib():
    "No more than 2 GiB beyond what this process has."
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    before, now = (
        resource.getrlimit(resource.RLIMIT_AS),
        int(statm.read_text().split()[0]) * resource.getpagesize(),
    )
    resource.setrlimit(resource.RLIMIT_AS, (now + 2 * GIB, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# The configuration


def survives(make, folder):
    "A configuration that is made can be written and read; one that is not is refused in one line."
    try:
        config = make()
    except (ValueError, OSError) as e:
        assert one_line(commands._sentence(e)) and len(str(e)) < 6000, e
        return
    save_config(folder, config)
    assert load_config(folder)[0] == config
    assert all(
        v == v and abs(v) != float("inf") for v in asdict(config).values() if isinstance(v, float)
    )


@examples(150)
@given(given=few)
def test_any_python_values(given, tmp_path):
    with two_gib():
        survives(
            lambda: configure(**{k: v for k, v in given.items() if k not in ("recipe", "config")}),
            tmp_path,
        )
        survives(lambda: TrainConfig(**{k: v for k, v in given.items() if k in hints}), tmp_path)


def bomb(n):
    return (
        "a0: &a0 [x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, n))
        + f"trackers: *a{n - 1}\n"
    )


yaml_words = st.sampled_from(
    [
        "epochs",
        "lr",
        "trackers",
        "model_kwargs",
        ": ",
        "- ",
        "\n",
        " ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "&a",
        "*a",
        "<<",
        "?",
        "|",
        ">",
        "!!set",
        "!!binary",
        "!!timestamp",
        "!!int",
        "!!bool",
        "!!python/object/apply:os.system",
        "null",
        "~",
        ".inf",
        "1:30",
        "2020-01-01",
        "2020-13-45",
        "'",
        '"',
        "#",
        "---",
        "%YAML 9.9",
        "\t",
        "0x1G",
        "1_000",
        "yes",
        "é",
        "\u2028",
        "\x00",
        "9" * 5000,
    ]
)
yaml_texts = st.one_of(
    st.sampled_from(
        [
            bomb(3),
            bomb(40),
            "lr: " + "[" * 5000,
            "{" * 5000,
            "a: &a [*a]",
            "epochs: null",
            "lr: .inf",
            "3: 4",
            "? [1, 2]\n: 3",
            "- a",
            "x",
            "model_kwargs: {" + ", ".join(f"k{i}: {i}" for i in range(3000)) + "}",
            "epochs: !!bool x",
            "seed: 2020-13-45",
            "\ufeffepochs: 3",
        ]
    ),
    st.lists(yaml_words, max_size=8).map("".join),
    st.dictionaries(names.filter(lambda n: "\ud800" not in n), values, max_size=3).map(
        lambda d: dumped(d)
    ),
)


def dumped(d):
    try:
        return yaml.safe_dump(d, allow_unicode=True)
    except (yaml.YAMLError, UnicodeError):
        return json.dumps(d, default=str)


@examples(200)
@given(text=yaml_texts)
def test_any_file_of_settings(text, tmp_path):
    (tmp_path / "a.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with two_gib():
        survives(lambda: configure(config=str(tmp_path / "a.yaml")), tmp_path)


@pytest.mark.parametrize(
    "make,said",
    [
        (lambda p: p.write_bytes(b"epochs: 3 #" + b"x" * 2**21), "bytes, expected at most"),
        (lambda p: p.write_bytes(b"\xff\xfe\xff"), "not UTF-8"),
        (lambda p: p.write_bytes(os.urandom(50) + b"\xff"), "not"),
        (lambda p: os.mkfifo(p), "no such file of settings"),
        (lambda p: p.symlink_to(p), "no such file of settings"),
        (lambda p: p.mkdir(), "no such file of settings"),
    ],
)
def test_a_file_of_settings_that_is_none(make, said, tmp_path):
    make(tmp_path / "a.yaml")
    with two_gib(), pytest.raises((ValueError, OSError), match=said):
        configure(config=str(tmp_path / "a.yaml"))


# The command line


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A folder to stand in, with pictures, a run, and what is neither."
    home = tmp_path_factory.mktemp("world") / "home"
    (home / "empty").mkdir(parents=True)
    (home / "file").write_text("text")
    rng = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (home / "photos" / kind).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(
                home / "photos" / kind / f"{i}.png"
            )
    for kind in ("images", "masks"):
        shutil.copytree(home / "photos" / "cat", home / "pairs" / kind)
    before = os.getcwd()
    os.chdir(home)
    try:
        with quiet():
            assert (
                main(
                    [
                        "train",
                        *words({**tiny, "data": "photos", "output": ".", "experiment": "run"}),
                    ]
                )
                == 0
            )
        yield home
    finally:
        os.chdir(before)


@contextlib.contextmanager
def quiet():
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        yield said


def words(chosen):
    "Settings as words of a command."
    for k, v in chosen.items():
        if isinstance(v, bool):
            yield f"--{'' if v else 'no-'}{k.replace('_', '-')}"
        elif v is not None:
            yield "--" + k.replace("_", "-")
            yield from (
                [f"{a}={b}" for a, b in v.items()]
                if isinstance(v, dict)
                else map(str, v)
                if isinstance(v, list)
                else [str(v)]
            )


def seen(home):
    "What there is, as it is."
    found = {}
    for folder, folders, files in os.walk(home):
        for n in files + folders:
            s = os.lstat(p := os.path.join(folder, n))
            found[p] = (s.st_mode, s.st_size, s.st_mtime_ns) if n in files else s.st_mode
    return found


def reads_pictures(job):
    "Instead of training: every picture is read once."
    for batches in (job.loaders.train.at(0), job.loaders.val):
        for _ in batches:
            pass
    return 0


scripts = {"benchmark": loss_benchmark.main, "benchmark-training": training_benchmark.main}


def ends_well(line, home, allowed, codes=(0, 2)):
    "Run a command; check that it ends well and changes only `allowed` places. Code, what it said."
    before, top = seen(home.parent), home.parent
    with (
        two_gib(),
        quiet() as said,
        patch.object(commands, "_work", reads_pictures),
        patch.object(loss_benchmark, "run_benchmark", lambda job: None),
        patch.object(training_benchmark, "run_training_benchmark", lambda *a: None),
    ):
        try:
            code = scripts[line[0]](line[1:]) if line[0] in scripts else main(line)
        except SystemExit as e:  # of argparse
            code = e.code
    assert code in codes, (line, code, said.getvalue())
    assert not code or one_line(said.getvalue()), (line, said.getvalue())
    after, places = (
        seen(top),
        [os.path.normpath(home / a) for a in allowed if a and "\x00" not in a],
    )
    changed = [p for p in {*before, *after} if before.get(p) != after.get(p)]
    for p in changed:
        inside = any(p == a or p.startswith(a + os.sep) or a.startswith(p + os.sep) for a in places)
        assert inside and p not in before or p in places, (line, p)
        if p not in before:
            shutil.rmtree(p, ignore_errors=True) if os.path.isdir(p) and not os.path.islink(
                p
            ) else Path(p).unlink(missing_ok=True)
    return code, said.getvalue()


def typed_values(kind):
    "Mostly what such a field holds, sometimes not."
    usual = {
        int: st.integers(0, 20),
        float: st.floats(0, 1),
        bool: st.booleans(),
        str: texts,
        list: st.lists(texts, min_size=1, max_size=2),
        dict: st.dictionaries(
            st.sampled_from(
                [
                    "depth",
                    "embed_dim",
                    "num_heads",
                    "patch_size",
                    "mlp_ratio",
                    "num_classes",
                    "in_chans",
                    "class_token",
                    "global_pool",
                    "img_size",
                    "drop_rate",
                    "qkv_bias",
                    "init_values",
                    "norm_layer",
                    "foo",
                ]
            ),
            st.one_of(st.integers(-1, 24), numbers, texts),
            min_size=1,
            max_size=2,
        ),
    }[kind]
    return usual if kind in (bool, dict) else st.one_of(usual, usual, numbers, texts)


offline = {
    "pretrained",
    "download",
    "teacher",
    "output",
}  # what would reach for the network, and what is drawn apart


@examples(60)
@given(data=st.data())
def test_any_words_of_train(world, data):
    chosen = data.draw(
        st.lists(st.sampled_from(sorted(set(hints) - offline)), max_size=3, unique=True)
    )
    more = {k: data.draw(typed_values(hints[k]), label=k) for k in chosen}
    output = data.draw(
        st.sampled_from(["out", "out", "out/deep", "file", "file/x", "é [b]", "x" * 300])
    )
    extra = data.draw(st.lists(texts, max_size=1)) if data.draw(st.integers(0, 4)) == 0 else []
    if isinstance(more.get("model_kwargs"), dict):
        more["model_kwargs"] = {**tiny["model_kwargs"], **more["model_kwargs"]}
    ends_well(
        ["train", *words({**tiny, "data": "photos", **more, "output": output}), *extra],
        world,
        [output],
        codes=(0, 1, 2),
    )


def letters(alphabet, most=12):
    return st.text(alphabet, max_size=most)


others = {
    "evaluate": (["run"], ["--weights", "--data", "--masks", "--device"]),
    "draw": (["run", "photos/cat/0.png"], ["--block", "--query", "--img-size", "--checkpoint"]),
    "benchmark": (
        ["--quick"],
        [
            "--shapes",
            "--kinds",
            "--peers",
            "--repeats",
            "--budget",
            "--threads",
            "--device",
            "--dtype",
        ],
    ),
    "benchmark-training": (
        [],
        [
            "--quick",
            "--model",
            "--model-kwargs",
            "--img-size",
            "--batch-size",
            "--updates",
            "--rounds",
            "--workers",
            "--amp-dtype",
            "--device",
            "--timm-train",
        ],
    ),
    "train": ([], ["--resume", "--config", "--recipe", "--masks", "--Lr"]),
}


@examples(50)
@given(data=st.data())
def test_any_words_of_the_others(world, data):
    command = data.draw(st.sampled_from(sorted(others)))
    first, known = others[command]
    first = [data.draw(texts) if data.draw(st.integers(0, 4)) == 0 else w for w in first]
    line = [command, *first]
    if command == "train":
        line += (
            words({**tiny, "data": "photos"}) if data.draw(st.booleans()) else ["--resume", "run"]
        )
    for flag in data.draw(st.lists(st.sampled_from(known), max_size=2, unique=True)):
        line += [
            flag,
            data.draw(st.one_of(texts, numbers.map(str), letters(string.digits + "x-=."))),
        ]
    output = data.draw(
        st.sampled_from(
            [
                "out.png",
                "out.json",
                "out",
                "file",
                "photos",
                "empty/a.svg",
                "no/a.png",
                "x" * 300,
                "é [b].png",
            ]
        )
    )
    if command != "train" and (command == "draw" or data.draw(st.booleans())):
        line += ["-o", output]
    ends_well(
        line,
        world,
        [output, "run/evaluation.json"] + ["out"] * (command == "train"),
        codes=(0, 1, 2),
    )


# Runs

replaced = st.one_of(
    st.sampled_from(
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b"3",
            b'"x"',
            b"\xff\xfe",
            b"\x00" * 100,
            b"[" * 20000,
            b"{}",
            b'{"classes": 3}',
            b"a: &a [*a]",
        ]
    ),
    st.binary(max_size=40),
    values.map(
        lambda v: json.dumps(v, default=str, skipkeys=True).encode("utf-8", "surrogatepass")
    ),
)
readers = [
    "evaluate RUN",
    "draw RUN photos/cat/0.png -o out.png",
    "train --resume RUN",
    "train --config RUN --output out",
    "train --data photos --output out -b 4 --img-size 16 --initial-checkpoint RUN "
    "--model-kwargs depth=1 embed_dim=12 num_heads=1 patch_size=8",
]


def harm(path, data):
    "Replace a file of a run, or a value in it."
    how = data.draw(
        st.sampled_from(
            ["bytes", "bytes", "cut", "gone", "folder", "loop", "value", "value", "value"]
        )
    )
    text = path.read_bytes()
    if how == "value" and path.suffix in (".json", ".yaml"):
        held = (json.loads if path.suffix == ".json" else yaml.safe_load)(text)
        key = data.draw(st.sampled_from(sorted(held)))
        held[key] = data.draw(values)
        if data.draw(st.booleans()):
            del held[key]
        return path.write_bytes(
            (
                json.dumps(held, default=str, skipkeys=True)
                if path.suffix == ".json"
                else dumped(held)
            ).encode("utf-8", "surrogatepass")
        )
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "cut":
        path.write_bytes(text[: data.draw(st.integers(0, len(text)))])
    elif how != "gone":
        path.write_bytes(data.draw(replaced))


@examples(60)
@given(data=st.data())
def test_any_run(world, data):
    run = world / "harmed"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(world / "run", run)
    files = sorted(
        p
        for p in run.rglob("*")
        if p.is_file() and p.suffix in (".json", ".yaml", ".csv", ".safetensors", ".pt", ".bin")
    )
    weighty = [
        p
        for p in files
        if p.name
        in ("facts.json", "config.yaml", "manifest.json", "evaluation.json", "metrics.csv")
    ]
    harm(data.draw(st.sampled_from(data.draw(st.sampled_from([files, weighty, weighty])))), data)
    reader = data.draw(st.sampled_from(readers)).replace("RUN", "harmed")
    try:
        ends_well(
            reader.split(),
            world,
            ["out", "out.png", "harmed/evaluation.json"] + ["harmed"] * ("--resume" in reader),
            codes=(0, 1, 2),
        )
    finally:
        shutil.rmtree(run, ignore_errors=True)


# Pictures


def encoded(kind, size=16):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (size, size, 3), np.uint8)).save(
        file, kind
    )
    return file.getvalue()


@st.composite
def picture_bytes(draw):
    whole = bytearray(
        encoded(draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])))
    )
    for _ in range(draw(st.integers(0, 6))):
        whole[draw(st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    return bytes(whole[: draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))])


file_names = st.one_of(
    st.sampled_from(
        [
            "a.png",
            "a.jpg",
            "a.gif",
            "a.tif",
            "[b].png",
            "a\nb.png",
            "$x^2$.png",
            "💥.png",
            ".png",
            "a.PNG",
            "a.png.txt",
        ]
    ),
    st.text(
        st.characters(blacklist_characters="/\x00", blacklist_categories=["Cs"]),
        min_size=1,
        max_size=20,
    ).map(lambda t: t + ".png"),
)


@examples(40)
@given(
    content=picture_bytes(),
    name=file_names,
    reader=st.sampled_from(["draw", "train", "evaluate", "masks"]),
)
def test_any_picture(world, content, name, reader):
    hostile = world / "hostile"
    shutil.rmtree(hostile, ignore_errors=True)
    try:
        if reader == "masks":
            shutil.copytree(world / "pairs", hostile)
            file = hostile / "masks" / name
            shutil.copy(world / "pairs" / "images" / "0.png", hostile / "images" / name)
        else:
            shutil.copytree(world / "photos", hostile)
            file = hostile / "cat" / name
        file.write_bytes(content)
        line = {
            "draw": ["draw", "run", str(file.relative_to(world)), "-o", "out.png"],
            "evaluate": ["evaluate", "run", "--data", "hostile"],
            "train": ["train", *words({**tiny, "limit": None, "data": "hostile"})],
            "masks": ["evaluate", "run", "--masks", "hostile"],
        }[reader]
        ends_well(line, world, ["out", "out.png", "run/evaluation.json"], codes=(0, 1, 2))
    finally:
        shutil.rmtree(hostile, ignore_errors=True)


# By name


@pytest.mark.parametrize(
    "more,said",
    [
        ("--lr inf", "lr: got inf, expected above 0, at most 1,000"),
        ("--min-lr nan", "min_lr: got nan"),
        ("--entropy-weight inf", "entropy_weight: got inf"),
        ("--clip-grad inf", "clip_grad: got inf"),
        (
            "--seed 99999999999999999999",
            "seed: got 99999999999999999999, expected from 0 to 4,294,967,295",
        ),
        ("--img-size 1000000", "img_size: got 1000000, expected from 1 to 4,096"),
        ("--workers 100000", "workers: got 100000, expected from 0 to 256"),
        ("--aug-repeats 1000000000", "aug_repeats: got 1000000000"),
        ("--crop-pct 1e-300", "crop_pct: got 1e-300, expected from 0.1 to 1"),
        ("--aa foo", "aa: got 'foo', expected timm's automatic augmentation"),
        ("--aa rand-m9-foo9", "aa: got"),
        ("--aa augmix-a0", "aa: got"),
        ("--aa rand-n99999999", "aa: got 'rand-n99999999', expected numbers below 1,000"),
        (
            "--interpolation bicubc",
            "interpolation: got 'bicubc', expected one of nearest, bilinear, bicubic",
        ),
        ("--compile foo", "compile: got 'foo'"),
        ("--device meta", "device: got 'meta'"),
        ("--device tpu9", "device: got 'tpu9'"),
        ("--trackers abacus", "trackers: got 'abacus'"),
        ("--opt adahessian", "opt: got 'adahessian', which cannot train here"),
        ("--amp-dtype half", "amp_dtype: got 'half', expected one of bfloat16, float16, none"),
        ("--model-kwargs embed_dim=0", "cannot be built"),
        ("--model-kwargs num_heads=0", "cannot be built"),
        ("--model-kwargs depth=1e400", "model_kwargs: got"),
        ("--model-kwargs depth=1 --model-kwargs depth=1", "model_kwargs: got 'depth' twice"),
        ("--model-kwargs embed_dim=100000000", "cannot be built"),
        ("--model-kwargs a=" + "[" * 5000, "model_kwargs: got"),
        (
            "--experiment ../above",
            "experiment: got '../above', expected the plain name of a folder",
        ),
        ("--experiment a/b", "the plain name of a folder"),
        ("--warmup-epochs 3", "warmup_epochs: got 3, expected at most epochs = 1"),
        ("--train-split cat --val-split cat", "expected two different parts"),
        ("--limit 4 --fraction .5", "limit and fraction: got both"),
        ("--teacher-checkpoint a.pth", "the name of its model too"),
        ("--epochs many", "argument --epochs: invalid int value: 'many'"),
        ("--epochs " + "9" * 5000, "argument --epochs"),
    ],
)
def test_a_value_that_cannot_be(world, more, said):
    named = {word.partition("=")[0] for word in more.split()}
    kept = {k: v for k, v in tiny["model_kwargs"].items() if k not in named}
    line = words({**tiny, "data": "photos", "model_kwargs": kept})
    code, err = ends_well(["train", *line, *more.split()], world, [])
    assert code == 2 and said in err


@pytest.mark.parametrize(
    "file,text,line,said",
    [
        ("facts.json", '{"mean": [1, 1, 1]}', "evaluate RUN", "facts.json: has no 'classes'"),
        ("facts.json", "[]", "evaluate RUN", "holds []"),
        (
            "facts.json",
            '{"classes": ["cat", "dog"], "mean": [0, 0, 0], "std": [0, 1, 1]}',
            "evaluate RUN",
            "std: got [0, 1, 1], expected three numbers above 0",
        ),
        (
            "facts.json",
            '{"classes": ["cat", "dog"]}',
            "draw RUN photos/cat/0.png -o out.png",
            "facts.json: has no 'mean'",
        ),
        ("facts.json", "[" * 10**5, "evaluate RUN", "not JSON"),
        (
            "facts.json",
            '{"classes": 7}',
            "evaluate RUN",
            "classes: got 7, expected a list of names",
        ),
        ("facts.json", None, "evaluate RUN", "no such file"),
        ("config.yaml", "- 1", "evaluate RUN", "holds a list"),
        ("config.yaml", "lr: .inf", "train --resume RUN", "lr: got inf"),
        (
            "config.yaml",
            bomb(30),
            "draw RUN photos/cat/0.png -o out.png",
            "aliases are not allowed",
        ),
        ("config.yaml", "epochs: null", "train --config RUN", "epochs: got None"),
        ("config.yaml", "3: 4", "evaluate RUN", "'3' is no setting"),
        ("config.yaml", "lr: " + "[" * 5000, "train --resume RUN", "nested more than"),
    ],
)
def test_a_run_with_a_file_that_cannot_be(world, file, text, line, said):
    run = world / "harmed"
    shutil.copytree(world / "run", run)
    try:
        (run / file).unlink() if text is None else (run / file).write_text(text)
        code, err = ends_well(line.replace("RUN", "harmed").split(), world, [])
        assert code == 2 and said in err
    finally:
        shutil.rmtree(run)


def test_weights_that_are_infinite_end_the_run(world):
    "A finite update can leave weights that are not: they are not saved with exit code 0."
    from spatial_entropy.training.loop import _apply

    def applied(job, *rest):
        _apply(job, *rest)
        next(job.model.parameters()).data[..., 0] = float("inf")

    with quiet() as said, patch.object(spatial_entropy.training.loop, "_apply", applied):
        code = main(
            ["train", *words({**tiny, "data": "photos", "output": "out", "experiment": "broken"})]
        )
    assert (
        code == 1
        and "weight(s) are NaN or infinite, the first is" in said.getvalue()
        and one_line(said.getvalue())
    )
    assert not list(Path("out/broken").glob("*.safetensors"))
    shutil.rmtree("out")
