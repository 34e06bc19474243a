"""A grid of runs: read with care, killed and gone on with, its table that of the undisturbed one."""
import csv
import json
import os
import random
import shutil
import signal
import time
from dataclasses import fields, replace
from io import StringIO
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from runs import Quick, processes, quick
from scipy import stats

import spatial_entropy as se
from spatial_entropy.commands import main
from spatial_entropy.data import shapes
from spatial_entropy.loops import alternatives
from spatial_entropy.training import comparing, loop
from spatial_entropy.training.comparing import Grid, compare, default_grid, planned, read_grid, summary, table
from spatial_entropy.training.files import Held, hold, use

DRAWN = comparing.draw_curves, comparing.draw_arms

TINY = dict(epochs=2, batch_size=8, img_size=16, workers=0, device="cpu", model_kwargs=dict(patch_size=8, embed_dim=12, depth=1, num_heads=2))
ARMS = {"plain": dict(keep_skip=True, regularizer="none"), "total variation": dict(keep_skip=True, regularizer="total-variation", entropy_weight=.1)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "40 pictures of four classes, each with its mask beside."
    root, drawn = tmp_path_factory.mktemp("photos"), shapes(100, size=16)
    for i, (picture, label) in enumerate(drawn):
        if label < 4:
            (root / "data" / drawn.classes[label]).mkdir(parents=True, exist_ok=True)
            picture.save(root / "data" / drawn.classes[label] / f"{i}.png")
    return root / "data"


def grid_of(photos, **more):
    return Grid(ARMS, seeds=[1, 2], common={**TINY, "data": str(photos), **more})


def quiet():
    return Console(file=StringIO(), width=100)


def kept(folder):
    "What a table says, durations left aside."
    with open(folder / "table.csv", newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module", autouse=True)
def grey():
    "Runs and reports draw grey pixels; what they draw is tested elsewhere, and once here."
    with quick(), patch.multiple(comparing, draw_curves=lambda runs: Quick(torch.zeros(4)), draw_arms=lambda runs: Quick(torch.zeros(4))):
        yield


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    rows, failed = compare(grid_of(photos), folder, console=quiet())
    assert not failed
    return folder, rows


def _child(grid, folder, jobs):
    compare(grid, folder, jobs, quiet())
    os._exit(0)


def test_killed_ten_times_the_table_is_the_same(photos, undisturbed, tmp_path):
    folder, rows = undisturbed
    draw, killed, ended, grid = random.Random(0), 0, 0, grid_of(photos)
    while killed < 10 or not ended:                              # a fast machine ends before the tenth: then once more from the start
        there = tmp_path / f"c{ended}"
        child = processes.Process(target=_child, args=(grid, there, 1))
        child.start()
        if killed < 10:
            child.join(draw.uniform(.02, .5))                    # also while a run starts, is measured or the report is written
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
                killed += 1
        child.join(120)
        assert child.exitcode in (0, -signal.SIGKILL)
        if child.exitcode == 0:
            assert kept(there) == kept(folder)
            assert (there / "index.html").read_text() == (folder / "index.html").read_text()
            ended += 1
    assert killed == 10


def test_two_at_a_time_give_the_same_table(photos, undisturbed, tmp_path):
    "One of them spawned, as all are, the other a fork, which is spared the imports."
    folder, rows = undisturbed
    grid, spawn = grid_of(photos), comparing.get_context("spawn")
    grid.seeds, ways = [1], iter([spawn, processes])
    with patch.object(comparing, "get_context", lambda method: next(ways)), patch.object(os, "cpu_count", lambda: 2):
        again, failed = compare(grid, tmp_path / "c", 2, quiet())           # with a thread each
    assert again == rows[:2] and not failed
    assert "epoch   2/2" in (tmp_path / "c" / "plain-seed1.log").read_text(encoding="utf-8")


def test_a_second_call_trains_nothing(photos, undisturbed):
    folder, rows = undisturbed
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/**/*") if p.is_file()}
    said = quiet()
    assert compare(grid_of(photos), folder, console=said)[0] == rows
    assert "4 of 4 runs are done" in said.file.getvalue()
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("*/**/*") if p.is_file()}


def test_asked_to_stop_it_saves_and_goes_on(photos, undisturbed, tmp_path, capfd):
    folder, _ = undisturbed
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(dict(arms=ARMS, seeds=[1, 2], common={**TINY, "data": str(photos)})))
    code = processes.Process(target=lambda: os._exit(main(["compare", str(tmp_path / "g.yaml"), "-o", str(tmp_path / "c")])))
    code.start()
    end = time.monotonic() + 60
    while not list((tmp_path / "c").glob("*/checkpoints/*")) and time.monotonic() < end:
        time.sleep(.01)
    os.kill(code.pid, signal.SIGTERM)
    code.join(60)
    if code.exitcode != 0:                                       # it may have been between two runs
        assert code.exitcode in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert main(["compare", str(tmp_path / "g.yaml"), "-o", str(tmp_path / "c")]) == 0
    assert kept(tmp_path / "c") == kept(folder)
    assert "top-1, %" in capfd.readouterr().out


def free(run):
    try:
        hold(run).release()
        return True
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_processes_of_a_comparison_end_with_it(photos, tmp_path, number):
    "Asked to end, it ends two, which are forks here; killed, the one that was spawned, as all are, sees it."
    grid, asked = grid_of(photos, epochs=1000), number == signal.SIGTERM
    grid.seeds, grid.arms = [1], dict(list(ARMS.items())[:1 + asked])
    with patch.object(comparing, "get_context", (lambda method: processes) if asked else comparing.get_context), patch.object(os, "cpu_count", lambda: 2):
        child = processes.Process(target=_child, args=(grid, tmp_path / "c", 2))
        child.start()
    end = time.monotonic() + 90
    while len(list((tmp_path / "c").glob("*/checkpoints/*"))) < 1 + asked and time.monotonic() < end:
        time.sleep(.05)
    os.kill(child.pid, number)
    child.join(60)
    assert not child.is_alive()
    end = time.monotonic() + 30
    while any((tmp_path / "c").glob("*-seed1")) and time.monotonic() < end and not all(map(free, (tmp_path / "c").glob("*-seed1"))):
        time.sleep(.1)
    for run in (tmp_path / "c").glob("*-seed1"):                 # nobody holds them any more
        hold(run).release()


def test_other_settings_are_refused_and_nothing_is_lost(photos, undisturbed, capsys, tmp_path):
    folder, rows = undisturbed
    with pytest.raises(ValueError, match="plain-seed1: was begun with epochs = 2, the grid says 3; give another --output"):
        compare(grid_of(photos, epochs=3), folder, console=quiet())
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(dict(arms=ARMS, seeds=[1], common={**TINY, "data": str(photos), "epochs": 3})))
    assert main(["compare", str(tmp_path / "g.yaml"), "-o", str(folder)]) == 2
    assert "was begun with epochs = 2" in capsys.readouterr().err
    assert table(planned(grid_of(photos), folder)) == rows


def test_more_seeds_go_on_with_what_is_there(photos, undisturbed, tmp_path):
    folder, rows = undisturbed
    grid = grid_of(photos)
    grid.seeds = [1, 2, 3]
    assert [comparing._scores(run, None) is not None for run in planned(grid, folder)] == [True] * 4 + [False] * 2


def test_only_the_evaluation_of_the_grid_counts(photos, undisturbed):
    "Of the validation pictures, of this data, with these masks, after the last epoch: another one is no line of the table."
    folder, rows = undisturbed
    run = planned(grid_of(photos), folder)[0]
    for name, changed in (("split", "train"), ("data", "others"), ("masks", "others"), ("weights_sha256", "0")):
        path = run.folder / "evaluation.json"
        whole = path.read_text(encoding="utf-8")
        path.write_text(json.dumps({**json.loads(whole), name: changed}), encoding="utf-8")
        assert table(planned(grid_of(photos), folder)) == rows[1:], name
        path.write_text(whole, encoding="utf-8")
    metrics = run.folder / "metrics.csv"
    whole = metrics.read_text(encoding="utf-8")
    metrics.write_text("".join(whole.splitlines(keepends=True)[:-1]), encoding="utf-8")
    assert table(planned(grid_of(photos), folder)) == rows[1:]
    metrics.unlink()
    assert table(planned(grid_of(photos), folder)) == rows[1:]
    metrics.write_text(whole, encoding="utf-8")
    comparing.keep_scores(run.folder, split="train")
    assert compare(grid_of(photos), folder, console=quiet()) == (rows, [])      # measured again, not trained


def test_a_run_without_its_weights_keeps_its_scores_and_is_not_trained_again(photos, undisturbed, tmp_path):
    folder = tmp_path / "without"
    shutil.copytree(undisturbed[0], folder)
    for run in planned(grid_of(photos), folder):
        (run.folder / "model.safetensors").unlink()
        shutil.rmtree(run.folder / "checkpoints")
    (folder / "maps.png").unlink()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.parent != folder}
    with patch.object(comparing, "_do", side_effect=AssertionError("trained again")):
        rows, failed = compare(grid_of(photos), folder, console=quiet())
    assert rows == undisturbed[1] and not failed
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "weights of these runs are not kept" in page and "maps.png" not in page
    (folder / "masks").mkdir()
    with pytest.raises(ValueError, match="its weights are gone, and its scores are not those of .*split val, masks"):
        compare(replace(grid_of(photos), masks=folder / "masks"), folder, console=quiet())
    assert before == {p: p.read_bytes() for p in before}
    weights = folder / "plain-seed1" / "model.safetensors"      # other weights are told from none
    shutil.copy(undisturbed[0] / "plain-seed2" / "model.safetensors", weights)
    runs = planned(grid_of(photos), folder)
    assert [comparing._scores(run, None) is None for run in runs] == [run.folder == weights.parent for run in runs]


def test_a_run_that_was_looked_at_too_early_is_trained_to_its_end(photos, undisturbed, tmp_path):
    grid = grid_of(photos)
    grid.seeds = [1]
    with patch.object(loop.RunProgress, "finish", side_effect=KeyboardInterrupt), pytest.raises(comparing.Interrupted):
        compare(grid, tmp_path / "c", console=quiet())           # after the first epoch
    comparing.keep_scores(tmp_path / "c" / "plain-seed1")
    assert compare(grid, tmp_path / "c", console=quiet()) == (undisturbed[1][:2], [])


@pytest.fixture
def changing(photos, tmp_path):
    "Photos of one's own, that a test may change, and a comparison of a seed with them."
    shutil.copytree(photos, tmp_path / "data")
    arms = {"plain": ARMS["plain"], "again": dict(keep_skip=True, regularizer="none", hflip=0.)}
    grid = Grid(arms, seeds=[1], common={**TINY, "epochs": 1, "data": str(tmp_path / "data")})
    assert not compare(grid, tmp_path / "c", console=quiet())[1]
    return grid, tmp_path / "c", sorted((tmp_path / "data").rglob("*.png"))


def test_pictures_that_changed_between_two_seeds_are_refused_before_a_run(changing):
    grid, folder, pictures = changing
    more, before = replace(grid, seeds=[1, 2]), sorted(folder.iterdir())
    pictures[0].rename(pictures[0].with_name("other.png"))                   # as many, but others
    with pytest.raises(ValueError, match="its pictures are not those of .*plain-seed1.*put the pictures back"):
        compare(more, folder, console=quiet())
    pictures[0].with_name("other.png").rename(pictures[0])
    pictures[0].with_name("more.png").write_bytes(pictures[0].read_bytes())
    with pytest.raises(ValueError, match="trained on 32 of them, now there would be 33"):
        compare(more, folder, console=quiet())
    assert sorted(folder.iterdir()) == before
    assert len(compare(grid, folder, console=quiet())[0]) == 2               # what is done is still a table


def test_pictures_that_change_while_a_comparison_runs_are_said(changing):
    grid, folder, pictures = changing
    pictures[0].with_name("more.png").write_bytes(pictures[0].read_bytes())
    said = quiet()
    with patch.object(comparing, "_check_pictures"):                         # it looked before the change
        compare(replace(grid, seeds=[1, 2]), folder, console=said)
    expected = "plain-seed2 was trained on other pictures (33) than plain-seed1 (32)"
    assert expected in " ".join(said.file.getvalue().split()) and expected in (folder / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_run_without_its_settings_gets_them_back_from_its_checkpoint(changing, how):
    grid, folder, _ = changing
    config, before = folder / "plain-seed1" / "config.yaml", kept(folder)
    text = config.read_text(encoding="utf-8")
    config.unlink() if how == "missing" else config.write_text("\n")
    said = quiet()
    assert not compare(grid, folder, console=said)[1] and f"{how}; taken from a checkpoint" in " ".join(said.file.getvalue().split())
    assert config.read_text(encoding="utf-8") == text and kept(folder) == before
    config.unlink() if how == "missing" else config.write_text("")
    shutil.rmtree(folder / "plain-seed1" / "checkpoints")
    with pytest.raises(ValueError, match=f"config.yaml is {how}, and there is no checkpoint .* give another --output"):
        compare(grid, folder, console=quiet())


def test_a_folder_of_something_else_is_refused_before_a_run(tmp_path, photos):
    (tmp_path / "c" / "plain-seed2").mkdir(parents=True)
    with pytest.raises(ValueError, match="plain-seed2: its config.yaml is missing"):
        compare(grid_of(photos), tmp_path / "c", console=quiet())
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["plain-seed2"]


def test_masks_are_looked_for_before_a_run(tmp_path, photos):
    with pytest.raises(FileNotFoundError, match="nowhere/images: no such folder"):
        compare(replace(grid_of(photos), masks=str(tmp_path / "nowhere")), tmp_path / "c", console=quiet())
    assert not (tmp_path / "c").exists()


def test_runs_that_the_grid_no_longer_has_are_named(photos, undisturbed):
    folder, said = undisturbed[0], quiet()
    try:
        rows, _ = compare(replace(grid_of(photos), seeds=[2]), folder, console=said)
        expected = "2 run(s) here are of no arm, part or seed of the grid, and are left out: plain-seed1, total_variation-seed1"
        assert len(rows) == 2 and expected in " ".join(said.file.getvalue().split())
        assert expected in (folder / "index.html").read_text(encoding="utf-8")
    finally:
        compare(grid_of(photos), folder, console=quiet())


def test_names_that_yaml_takes_for_numbers_are_to_be_quoted(tmp_path):
    for name in ("0.1", "on", "2024-01-01", "null"):
        (tmp_path / "g.yaml").write_text(f"arms:\n  {name}: {{}}\n")
        with pytest.raises(ValueError, match="in quotes what is no text without them"):
            read_grid(tmp_path / "g.yaml")
        (tmp_path / "g.yaml").write_text(f"arms:\n  '{name}': {{}}\n")
        assert list(read_grid(tmp_path / "g.yaml").arms) == [name]


def test_a_score_and_what_it_has_above_chance_are_of_one_kind():
    "Where masks have void, the published Jaccard is another score than the one that has a chance level beside it."
    assert "jaccard" in comparing.MEASURES and "jaccard_best_head" not in comparing.MEASURES


def test_a_size_of_updates_that_changed_is_noticed(photos, undisturbed):
    with pytest.raises(ValueError, match="was begun with grad_accum_steps = 1, the grid says 2"):
        compare(grid_of(photos, grad_accum_steps=2), undisturbed[0], console=quiet())


def test_two_comparisons_in_one_folder(photos, undisturbed):
    folder, rows = undisturbed
    with use(hold(folder)), pytest.raises(Held, match="in use"):
        compare(grid_of(photos), folder, console=quiet())
    assert compare(grid_of(photos), folder, console=quiet())[0] == rows


def test_a_report_that_cannot_be_written_stops_no_run(photos, undisturbed, tmp_path):
    folder, rows = undisturbed
    grid, said, tried, write = grid_of(photos), quiet(), [], comparing.write_report
    grid.seeds = [1]
    def twice_not(*given):
        tried.append(given)
        if len(tried) <= 2:
            raise OSError("table.csv: open in another program")
        return write(*given)
    with patch.object(comparing, "write_report", twice_not):
        assert compare(grid, tmp_path / "c", console=said) == (rows[:2], [])
    assert said.file.getvalue().count("no report yet: table.csv: open in another program") == 2 and len(tried) == 3


def test_without_the_first_arm_nothing_is_compared_with_another(photos):
    rows = [dict(arm=arm, part="all", seed=s, top1=float(s)) for arm in "bc" for s in (1, 2)]
    assert all("less" not in line for line in summary(rows, ["a", "b", "c"]))


def test_a_run_is_measured_where_it_was_trained(photos, undisturbed):
    run = undisturbed[0] / "plain-seed1"
    assert comparing.trained_on(run) == "cpu"
    facts = (run / "facts.json").read_text(encoding="utf-8")
    (run / "facts.json").write_text(facts.replace('"device": "cpu"', '"device": "a GPU that is gone"'), encoding="utf-8")
    assert comparing.trained_on(run) == "cpu"
    with patch("spatial_entropy.training.evaluating.usable_device", lambda name: name):
        assert comparing.trained_on(run) == "a GPU that is gone"
    (run / "facts.json").write_text(facts, encoding="utf-8")


def test_a_run_that_fails_does_not_stop_the_others(photos, tmp_path, capfd):
    arms = {"plain": ARMS["plain"], "wild": dict(lr=900., opt="sgd", clip_grad=0, max_skips=0, warmup_epochs=0, keep_skip=True)}
    grid = Grid(arms, seeds=[1], common={**TINY, "data": str(photos), "epochs": 8})
    rows, failed = compare(grid, tmp_path / "c", console=quiet())
    if not failed:
        pytest.skip("so large a rate stayed finite here")
    assert [row["arm"] for row in rows] == ["plain"] and failed[0].startswith("wild-seed1: epoch")
    assert "Not done: wild-seed1" in (tmp_path / "c" / "index.html").read_text()


def test_what_only_the_start_of_a_run_finds_is_named_and_stops_no_other(photos, tmp_path, capfd):
    "Settings that contradict the model or the data are no error of the configuration."
    arms = {"size": dict(img_size=17), "batch": dict(batch_size=5000), "plain": ARMS["plain"]}
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(dict(arms=arms, seeds=[1], common={**TINY, "data": str(photos)})))
    assert main(["compare", str(tmp_path / "g.yaml"), "-o", str(tmp_path / "c")]) == 1
    said = capfd.readouterr().err
    assert "not done: size-seed1: img_size: got 17" in said and "not done: batch-seed1: batch_size: got 5000" in said and "Traceback" not in said
    assert [row["arm"] for row in kept(tmp_path / "c")] == ["plain"]


def test_arms_of_different_sizes_are_drawn(photos, tmp_path):
    grid = Grid({"small": ARMS["plain"], "large": {**ARMS["plain"], "img_size": 24}}, [1], {**TINY, "data": str(photos), "epochs": 1})
    with patch.multiple(comparing, draw_arms=DRAWN[1]):
        rows, failed = compare(grid, tmp_path / "c", console=quiet())
    assert not failed and len(rows) == 2 and (tmp_path / "c" / "maps.png").stat().st_size > 5000


@pytest.mark.parametrize("arms, parts, said", [
    ({"no skip": {}, "No_skip": {}}, [{}], "'no skip' and 'No_skip' would share a folder"),
    ({"a": dict(limit=5)}, [dict(limit=50)], "arms: a: got limit, which the grid sets"),
    ({"a": dict(fraction=.5)}, [dict(fraction=.1)], "arms: a: got fraction, which the grid sets")])
def test_arms_that_would_get_in_each_other_s_way(arms, parts, said):
    with pytest.raises(ValueError, match=said):
        Grid(arms, parts=parts)
    assert Grid({"a": dict(limit=5)}).arms == {"a": dict(limit=5)}


@pytest.mark.parametrize("visible, found", [(None, [0, 1, 2, 0]), ("4,5,7", ["4", "5", "7", "4"]), ("GPU-a,GPU-b,GPU-c", ["GPU-a", "GPU-b", "GPU-c", "GPU-a"])])
def test_each_slot_has_a_gpu_that_this_process_may_use(monkeypatch, visible, found):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [comparing._gpu_of(slot) for slot in range(4)] == found
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert comparing._gpu_of(0) is None


def test_a_single_seed_has_no_interval_in_the_file_either(photos, tmp_path):
    compare(Grid({k: ARMS[k] for k in ARMS}, [1], {**TINY, "data": str(photos), "epochs": 1}), tmp_path / "c", console=quiet())
    text = (tmp_path / "c" / "summary.json").read_text()
    assert "NaN" not in text and {line["low"] for line in json.loads(text)["summary"]} == {None}


def test_terms_of_one_s_own(photos, tmp_path):
    calls = []

    def mine(maps):
        calls.append(maps.shape)
        return maps.square().mean()

    se.register_regularizer("mine", mine)
    try:
        grid = Grid({"mine": dict(regularizer="mine", entropy_weight=1., entropy_schedule="constant")}, [1], {**TINY, "data": str(photos), "epochs": 1})
        rows, failed = compare(grid, tmp_path / "c", console=quiet())
        assert not failed and len(calls) > 3 and calls[0][1:] == (2, 2, 2)
    finally:
        del alternatives._terms["mine"]
    with pytest.raises(ValueError, match="expected one of spatial-entropy"):
        Grid({"mine": dict(regularizer="mine")})


@pytest.mark.parametrize("text, said", [
    ("arms: {}", "arms: got none"), ("seeds: [1]", "arms: expected names"), ("arms: {a: {}}\nseeds: [1, 1]", "seeds: got [1, 1]"),
    ("arms: {a: {}}\nseeds: [1.5]", "seeds: got [1.5]"), ("arms: {a: {}}\nseeds: 3", "seeds: got 3"), ("arms: {a: {}}\nseeds: [true]", "seeds: got [True]"),
    ("arms: {../a: {}}", "arms: got the name"), ("arms: {a: {seed: 1}}", "got seed, which the grid sets"), ("arms: {a: [1]}", "arms: a: got [1]"),
    ("arms: {a: {epochs: many}}", "arms: a: epochs: got 'many'"), ("arms: {a: {}}\ncommon: {output: x}", "common: got output"),
    ("arms: {a: {}}\nlimit: [10]\nfraction: [.5]", "limit and fraction"), ("arms: {a: {}}\nfraction: [2]", "fraction: got 2"),
    ("arms: {a: {}, a: {}}", "stands twice"), ("arms: &x {a: *x}", "aliases"), ("arms: {a: {}}\njobs: 2", "'jobs' is no part of a grid"),
    ("arms: {a: {regularizer: nope}}", "regularizer: got 'nope'"), ("arms: {a: {entropy_schedule: up}}", "expected one of decay, warmup, constant"),
    ("arms: {1: {}}", "arms: got the name 1"), ("", "holds None"), ("arms: {" + "a" * 80 + ": {}}", "at most 60")])
def test_hostile_grids(tmp_path, capsys, text, said):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(ValueError) as e:
        read_grid(tmp_path / "g.yaml")
    assert said in str(e.value) and str(e.value).startswith(str(tmp_path / "g.yaml"))
    assert main(["compare", str(tmp_path / "g.yaml"), "-o", str(tmp_path / "c")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "c").exists()


def test_parts_of_the_data():
    grid = Grid({"a": {}, "b": {}}, [1, 2], parts=[{"limit": 50}, {"limit": 100}])
    runs = planned(grid, "c")
    assert [r.folder.name for r in runs][:4] == ["a-limit50-seed1", "b-limit50-seed1", "a-limit100-seed1", "b-limit100-seed1"]
    assert [(r.config.limit, r.config.seed) for r in runs][-1] == (100, 2) and len({r.folder for r in runs}) == 8


def test_the_summary_is_that_of_scipy():
    rng = np.random.default_rng(0)
    rows = [dict(arm=arm, part="all", seed=s, top1=50 + rng.normal() + 2 * (arm == "b")) for s in range(7) for arm in "ab"]
    line = next(x for x in summary(rows) if x["arm"] == "b")
    a, b = ([r["top1"] for r in rows if r["arm"] == arm] for arm in "ab")
    want = stats.ttest_rel(b, a).confidence_interval(.95)
    assert np.allclose([line["less"]["low"], line["less"]["high"]], want) and np.isclose(line["less"]["mean"], np.mean(b) - np.mean(a))
    assert np.allclose([line["low"], line["high"]], stats.t.interval(.95, 6, np.mean(b), stats.sem(b)))
    assert next(x for x in summary(rows[:2]) if x["arm"] == "b")["less"]["n"] == 1          # one seed: no interval
    assert np.isnan(next(x for x in summary(rows[:2]) if x["arm"] == "b")["less"]["low"])


def test_only_seeds_that_both_have_are_compared():
    rows = [dict(arm="a", part="all", seed=s, top1=float(s)) for s in (1, 2, 3)] + [dict(arm="b", part="all", seed=s, top1=s + 1.) for s in (2, 3, 4)]
    assert next(x for x in summary(rows) if x["arm"] == "b")["less"]["n"] == 2


def test_the_default_grid_differs_in_the_loss_alone(tmp_path):
    grid = default_grid()
    (a, b), seeds = (run.config for run in planned(grid, tmp_path)[:2]), {run.seed for run in planned(grid, tmp_path)}
    assert {f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)} == {"regularizer", "entropy_weight", "experiment"}
    assert a.regularizer == "none" and b.regularizer == "spatial-entropy" and len(seeds) == 3
    assert a.data == "shapes/one" and a.initial_checkpoint == "demo" and a.img_size == 112


def test_the_files_are_what_they_say(photos, undisturbed):
    folder, rows = undisturbed
    with patch.multiple(comparing, draw_curves=DRAWN[0], draw_arms=DRAWN[1]):
        assert comparing.write_report(grid_of(photos), folder) == rows
    found = json.loads((folder / "summary.json").read_text())
    assert found["runs"] == found["of"] == 4 and {x["arm"] for x in found["summary"]} == set(ARMS)
    page = (folder / "index.html").read_text()
    assert "total variation, n = 2" in page and (folder / "maps.png").stat().st_size > 20000 and (folder / "curves.png").stat().st_size > 20000


def test_an_error_fits_into_a_pipe(photos, tmp_path):
    run, *_ = planned(grid_of(photos), tmp_path)
    with patch.object(comparing, "_do", side_effect=ValueError("no such class " * 10_000)):
        said = comparing._tried(run, None, None)
    assert said.startswith(f"{run.folder.name}: no such class") and len(said) < 3000


def test_small_numbers_keep_their_digits(tmp_path):
    from spatial_entropy.training.files import write_rows
    write_rows(tmp_path / "a.csv", [dict(lr=4.123456789e-7, loss=1.23456789, none=0., minus=-2e-9, nan=float("nan"))])
    assert (tmp_path / "a.csv").read_text().splitlines()[1] == "4.12346e-07,1.234568,0.0,-2e-09,nan"
