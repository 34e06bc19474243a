"""Effects of a comparison that has ended: against scipy, with runs that are missing, and from files that are not what they should be."""
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import spatial_entropy as se
from spatial_entropy.training.comparing import summary

ARMS = "plain", "surgery", "loss", "both"
RESULTS = Path(__file__).parent.parent / "results"


def drawn(seeds=6, missing=(), parts=("all",)):
    "Rows of a study of four arms, and the numbers (arm, part, seed) in them."
    rng = np.random.default_rng(0)
    y = rng.normal(size=(len(ARMS), len(parts), seeds)) + rng.normal(size=seeds)
    rows = [dict(arm=a, part=p, seed=s, top1=y[i, j, s]) for i, a in enumerate(ARMS) for j, p in enumerate(parts) for s in range(seeds)
            if (a, s) not in missing]
    return rows, y


def of(table, column):
    return next(line for line in table.lines if line["column"] == column)


def test_an_effect_is_that_of_scipy():
    rows, y = drawn()
    plain, surgery, loss, both = y[:, 0]
    table = se.effects(se.Comparison(rows), {**se.two_by_two(*ARMS), "alone": ("loss", "plain")})
    for column, d in (("surgery", (surgery - plain + both - loss) / 2), ("loss", (loss - plain + both - surgery) / 2),
                      ("interaction", both - surgery - loss + plain), ("alone", loss - plain)):
        line, interval = of(table, column), stats.ttest_1samp(d, 0).confidence_interval()
        np.testing.assert_allclose([line["mean"], line["low"], line["high"]], [d.mean(), *interval], rtol=1e-5)
        flipped = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert line["p"] == pytest.approx(flipped.pvalue) and line["n"] == 6
    assert of(table, "plain")["mean"] == pytest.approx(plain.mean())


def test_main_effects_are_those_of_a_regression():
    rows, y = drawn()
    x = np.array([[1, a, b, a * b] for a, b in ((-.5, -.5), (.5, -.5), (-.5, .5), (.5, .5))])
    coefficients = np.linalg.lstsq(x, y[:, 0].mean(1), rcond=None)[0]
    table = se.effects(se.Comparison(rows), se.two_by_two(*ARMS))
    np.testing.assert_allclose([of(table, c)["mean"] for c in ("surgery", "loss", "interaction")], coefficients[1:])


def test_a_seed_that_an_arm_lacks_is_left_out_of_what_needs_it():
    rows, y = drawn(missing={("both", 2), ("loss", 0)})
    study = se.Comparison(rows)
    assert np.isnan(study.values("both", "top1")).tolist() == [False, False, True, False, False, False]
    table = se.effects(study, {"both": ("both", "plain"), "last": ("both", "loss")})
    assert of(table, "both")["n"] == 5 and of(table, "last")["n"] == 4
    ours = np.delete(y[3, 0] - y[0, 0], 2)
    assert of(table, "both")["mean"] == pytest.approx(ours.mean())
    assert of(study.means(), "plain")["n"] == 6


def test_a_single_seed_has_no_interval():
    rows, y = drawn(seeds=1)
    table = se.effects(se.Comparison(rows), {"both": ("both", "plain")})
    line = of(table, "both")
    assert line["mean"] == pytest.approx((y[3] - y[0]).item()) and math.isnan(line["low"]) and math.isnan(line["p"])
    assert "±" not in repr(table) and "*" not in repr(table)


def test_parts_of_the_data_are_named():
    rows, y = drawn(parts=("limit 10", "limit 20"))
    study = se.Comparison(rows)
    np.testing.assert_array_equal(study.values("loss", "top1", "limit 20"), y[2, 1])
    for call in (lambda: study.values("loss", "top1"), lambda: se.effects(study, {}), lambda: study.means(part="limit 30")):
        with pytest.raises(ValueError, match="expected one of limit 10, limit 20"):
            call()


def test_it_agrees_with_the_summary_of_a_comparison():
    with open(RESULTS / "scratch_photographs" / "table.csv", newline="", encoding="utf-8") as file:
        rows = [{k: v if k in ("run", "arm", "part") else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    less = {(line["arm"], line["measure"]): line["less"] for line in summary(rows) if "less" in line}
    study = se.read_comparison(RESULTS / "scratch_photographs")
    for line in se.effects(study, {arm: (arm, "plain") for arm in ARMS[1:]}, ["top1", "entropy", "jaccard_above"]).lines:
        if line["column"] != "plain":
            there = less[line["column"], line["measure"]]
            assert {k: line[k] for k in there} == there


@pytest.mark.parametrize("folder", ["tuning", "photographs", "scratch_photographs", "small_data/1000"])
def test_below_chance_is_worked_out_for_tables_that_lack_it(folder):
    study = se.read_comparison(RESULTS / folder)
    for arm in study.arms:
        np.testing.assert_allclose(study.values(arm, "below_chance"), study.values(arm, "entropy_chance") - study.values(arm, "entropy"))


def written(folder, rows, file=None):
    folder.mkdir(exist_ok=True)
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)
    for row in rows:
        (folder / row["run"]).mkdir(exist_ok=True)
        if file:
            (folder / row["run"] / "test.json").write_text(file, encoding="utf-8")
    return folder


ROW = dict(run="a-seed1", arm="a", part="all", seed=1, top1=3.5, density="")


def test_what_is_empty_or_null_is_nan(tmp_path):
    study = se.read_comparison(written(tmp_path / "a", [ROW], '{"top1": null, "entropy": 0.5, "notes": ["x"], "data": "y", "ok": true}'))
    assert study.values("a", "top1") == 3.5 and np.isnan(study.values("a", "density"))
    test = se.read_comparison(tmp_path / "a", "test.json")
    assert test.values("a", "entropy") == .5 and test.measures == ["entropy"]


@pytest.mark.parametrize("break_it, said", [
    (lambda folder: (folder / "table.csv").unlink(), "is not there; expected the folder that `spatial-entropy compare` wrote"),
    (lambda folder: (folder / "table.csv").write_text("a,b\n1,2\n"), "is no table of a comparison"),
    (lambda folder: (folder / "table.csv").write_text("run,arm,seed,top1\nr,a,1,high\n"), "is no table of a comparison"),
    (lambda folder: (folder / "table.csv").write_text("run,arm,seed,top1\nr,a,1\n"), "r/test.json"),
    (lambda folder: (folder / "table.csv").write_bytes(b"run,arm\xff"), "table.csv"),
    (lambda folder: (folder / "table.csv").write_text("run,arm,seed,top1\n"), "rows: got none"),
    (lambda folder: (folder / "a-seed1" / "test.json").unlink(), "test.json"),
    (lambda folder: (folder / "a-seed1" / "test.json").write_text("{"), "holds no measured scores"),
    (lambda folder: (folder / "a-seed1" / "test.json").write_text("[1]"), "holds no measured scores"),
    (lambda folder: (folder / "a-seed1" / "test.json").write_bytes(b"\xff"), "holds no measured scores")])
def test_what_is_no_comparison_is_named(tmp_path, break_it, said):
    folder = written(tmp_path / "a", [ROW], json.dumps(dict(top1=1.)))
    break_it(folder)
    with pytest.raises((ValueError, OSError), match=said):
        se.read_comparison(folder, "test.json")


def test_what_is_asked_in_vain_is_named():
    study = se.Comparison(drawn()[0])
    for call, said in ((lambda: se.effects(study, {"x": ("both", "both")}), "two different arms"),
                       (lambda: se.effects(study, {"x": {"none": 1}}), "arm: got 'none', expected one of plain"),
                       (lambda: se.effects(study, {}, ["top5"]), "measure: got 'top5', expected one of top1"),
                       (lambda: se.effects(study, {}, base="x"), "arm: got 'x'"),
                       (lambda: se.effects(study, {"x": {}}), "a weight for each arm"),
                       (lambda: se.Comparison(drawn()[0] * 2), "got two of"),
                       (lambda: se.Comparison([]), "got none"),
                       (lambda: se.draw_seeds(study, ["top5"]), "measure: got 'top5'"),
                       (lambda: se.draw_seeds(study, columns=0), "columns: got 0")):
        with pytest.raises(ValueError, match=said):
            call()


def test_a_table_can_be_turned_and_is_safe_in_markdown():
    rows = [dict(row, arm=row["arm"].replace("both", "a|b")) for row in drawn()[0]]
    table = se.Comparison(rows, {"top1": ("top-1, *%*", 2)}).means()
    lines = table._repr_markdown_().splitlines()
    assert len(lines) == 3 and r"a\|b" in lines[0] and r"\*%\*" in lines[2] and lines[1] == "| --- | --: | --: | --: | --: |"
    assert len(table.T._repr_markdown_().splitlines()) == 6 and table.T.T.rows() == table.rows()
    assert len({len(line) for line in repr(table).splitlines()}) == 1


def test_an_effect_called_as_its_base_keeps_both():
    table = se.effects(se.Comparison(drawn()[0]), {"plain": ("both", "plain")})
    assert table.rows()[0] == ["", "mean of plain", "plain"]


def test_the_picture_has_every_seed():
    figure = se.draw_seeds(se.Comparison(drawn(missing={("both", s) for s in range(6)} | {("loss", 1)})[0] + [dict(arm="both", seed=9)]), ["top1"])
    (ax,) = [ax for ax in figure.axes if ax.axison]
    assert len(ax.lines) == 7 + 1 and ax.get_title() == "top-1, %"
    assert np.isnan(ax.lines[-1].get_ydata()[-1]) and np.isfinite(ax.lines[-1].get_ydata()[:-1]).all()


def test_an_arm_called_as_the_third_effect_is_refused():
    with pytest.raises(ValueError, match="an arm called interaction"):
        se.two_by_two("plain", "interaction", "loss", "both")
