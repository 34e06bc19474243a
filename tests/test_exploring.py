"""The explorer's core: every number of a view is the library's own, whatever is chosen; a broken choice is one sentence."""
import base64
import copy
import io
import json
import resource
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import spatial_entropy as se
from spatial_entropy.data import mask_pairs
from spatial_entropy.exploring import SURROGATES, Explorer, as_state, file_of, items_of, reply, thresholded

VIT = dict(img_size=64, patch_size=16, embed_dim=48, depth=3, num_heads=4, num_classes=5)


@pytest.fixture(scope="module")
def two():
    "Two models of different depth and width on the built-in pictures."
    torch.manual_seed(0)
    return Explorer({"plain": se.demo_model(), "other": timm.create_model("vit_tiny_patch16_224", **VIT)}, "shapes/one")


def tapped(subject, image, block, query):
    with se.AttentionTap(subject.model, block, query) as tap, torch.no_grad():
        subject.model(subject.transform(image)[None])
        return tap.maps()[0]


@pytest.mark.parametrize("connectivity", [8, 4])
@pytest.mark.parametrize("threshold", [dict(), dict(times_mean=1.3), dict(times_mean=0), dict(mass=.6)], ids=str)
def test_every_number_is_the_librarys(two, threshold, connectivity):
    for picture, block, query in ((0, -1, "auto"), (17, 0, (2, 3)), (17, -1, "mean")):
        check_numbers(two, picture, block, query, threshold, connectivity)


def check_numbers(two, picture, block, query, threshold, connectivity):
    view = two.view(picture=picture, block=block, query=query, connectivity=connectivity, head=1, **threshold)
    for subject, side in zip(two.subjects, view.sides):
        image, mask = mask_pairs("shapes/one", two.subjects[0].size).read(picture)
        maps = tapped(subject, image, block, query)
        torch.testing.assert_close(side.maps, maps, rtol=0, atol=0)
        x, on = maps, se.above_mean(maps)
        if "mass" in threshold:
            x = maps.flatten(-2).softmax(-1).view(maps.shape)
            on = se.keep_mass(x, threshold["mass"])
        elif threshold:
            x = maps - maps.amin((-2, -1), keepdim=True)
            on = se.above_mean(x, threshold["times_mean"])
        E = se.spatial_entropy(x, connectivity, **threshold)
        labels = se.label_regions(on, connectivity)
        others = thresholded(se.surrogate_maps(maps, SURROGATES), **threshold)[0]
        known = dict(entropy=E, regions=labels.amax((-2, -1)).float(), chance=se.spatial_entropy(others, connectivity, **threshold).mean(0),
                     jaccard=se.mask_jaccard(maps[None], mask[None])[0].float(), pixel_auc=se.pixel_auc(maps[None], mask[None])[0].float(),
                     energy_pointing=se.energy_pointing(maps[None], mask[None])[0].float(), density=on.float().mean((-2, -1)))
        for name, value in known.items():
            assert torch.equal(side.columns[name], value), name
            assert side[name] == value[1].item() == side.numbers()[name]
        assert torch.equal(side.labels, labels[1])
        assert len(side.shares) == labels[1].max()
        P = side.shares
        torch.testing.assert_close(-torch.special.xlogy(P, P).sum().float(), E[1], rtol=1e-5, atol=2e-6)
        if not threshold:
            torch.testing.assert_close(P.float(), se.region_mass(maps[1], labels[1]))
            if connectivity == 8:
                assert torch.equal(side.columns["chance"], se.entropy_against_chance(maps, SURROGATES).chance)


def test_the_code_of_a_view_leads_to_its_numbers(two, tmp_path):
    se.shapes(1, size=90)[0][0].save(tmp_path / "a b.png")
    for explorer, given in ((Explorer(images=tmp_path), dict(query=(3, 3), mass=.4)), (Explorer(), dict(picture=5, times_mean=1.5, connectivity=4, head=2)),
                            (Explorer(images="shapes/one"), dict(picture=9, block=1))):
        view = explorer.view(**given)
        exec(view.code, made := {})
        side = view.sides[0]
        assert (made["E"].item(), made["chance"].item()) == (side["entropy"], side["chance"])
        assert torch.equal(made["labels"], side.labels)


def test_heads_are_sorted(two):
    for sort, column, sign in (("entropy", "entropy", 1), ("difference", "difference", 1), ("overlap", "jaccard", -1)):
        for side in two.view(picture=3, sort=sort).sides:
            values = [sign * row[column] for row in side.numbers()["heads"]]
            assert values == sorted(values) and sorted(side.order) == list(range(len(side.maps)))
    assert two.view(sort="head").sides[1].order == [0, 1, 2, 3]


def test_each_model_has_a_block_and_a_head_of_its_own(two):
    a, b = two.view(block=(3, 0), head=(2, -1)).sides
    assert (a.block, a.head, b.block, b.head) == (3, 2, 0, 3)


def test_a_run_and_a_folder_with_masks(tmp_path):
    from spatial_entropy.demo import DEMO
    from spatial_entropy.training.config import TrainConfig, save_config
    from spatial_entropy.training.models import save_weights
    run = tmp_path / "run"
    run.mkdir()
    kwargs = {k: v for k, v in DEMO.items() if k not in ("img_size", "num_classes")}
    save_config(run, TrainConfig(img_size=112, model_kwargs=kwargs, keep_skip=True), classes=se.shapes(1).classes, mean=(.5,) * 3, std=(.5,) * 3)
    save_weights(se.demo_model().state_dict(), run / "model.safetensors")
    data = se.shapes(4, size=100)
    for kind, arrays in (("images", data.images), ("masks", data.masks)):
        (tmp_path / "pairs" / kind).mkdir(parents=True)
        for i, a in enumerate(arrays):
            Image.fromarray(a).save(tmp_path / "pairs" / kind / f"{i}.png")
    explorer = Explorer(run, tmp_path / "pairs")
    view = explorer.view(picture=2)
    assert len(explorer.items) == 4 and view.mask.any() and "jaccard" in view.sides[0].columns
    exec(view.code, made := {})
    assert made["E"].item() == view.sides[0]["entropy"]
    memory = Explorer(se.demo_model(), [(data.images[2], data.masks[2]), data[1][0]])
    assert memory.view().mask.any() and memory.view(picture=1).mask is None
    assert memory.view().sides[0]["jaccard"] > 0


def test_maps_are_computed_once_a_picture():
    explorer, ran = Explorer(), []
    explorer.subjects[0].model.register_forward_hook(lambda *a: ran.append(1))
    explorer.view(picture=1)
    for given in (dict(block=0), dict(head=2), dict(times_mean=2), dict(mass=.5), dict(connectivity=4), dict(sort="overlap")):
        explorer.view(picture=1, **given)
    assert len(ran) == 1
    explorer.view(picture=1, query=(3, 3))
    explorer.view(picture=1, query=(3, 3), block=1)
    assert len(ran) == 2
    assert "_tap_sites" not in vars(explorer.subjects[0].model.blocks[-1].attn)             # and no tap stays


@pytest.mark.parametrize("change", [
    lambda m: m.load_state_dict({k: 1.1 * v for k, v in m.state_dict().items()}), lambda m: [p.data.mul_(1.1) for p in m.parameters()],
    lambda m: [setattr(p, "data", 1.1 * p.data) for p in m.parameters()], lambda m: setattr(m.blocks[0], "mlp", torch.nn.Identity()),
], ids=["loaded", "in place", "replaced", "a module"])
def test_a_model_that_has_changed_is_looked_at_anew(change):
    model = copy.deepcopy(se.demo_model())
    explorer = Explorer(model)
    before, other = explorer.view(picture=2), explorer.view(picture=1)
    assert explorer.view(picture=2).sides[0].maps is before.sides[0].maps
    change(model)
    after, fresh = explorer.view(picture=2), Explorer(model).view(picture=2)
    assert not torch.equal(after.sides[0].maps, before.sides[0].maps) and after.numbers() == fresh.numbers()
    assert explorer.view(picture=1).numbers() != other.numbers()


def test_a_model_in_training_is_looked_at_anew():
    model = copy.deepcopy(se.demo_model())
    explorer, optimizer = Explorer(model), torch.optim.AdamW(model.parameters(), .01)
    before = explorer.view().numbers()
    model(torch.rand(2, 3, 112, 112)).square().mean().backward()
    assert explorer.view().numbers() == before
    optimizer.step()
    assert explorer.view().numbers() == Explorer(model).view().numbers() != before


def test_an_update_takes_100_ms_at_most():
    "CPU time of a whole answer, as a widget gets it, in the demo model and in a ViT-S/16 at 224 pixels."
    torch.manual_seed(0)
    small = timm.create_model("vit_small_patch16_224").eval()
    for explorer in (Explorer(), Explorer(small)):
        for name, given in (("threshold", dict(times_mean=1.2)), ("connectivity", dict(connectivity=4)), ("head", dict(head=2)), ("mass", dict(mass=.5))):
            reply(explorer, dict(kind="view"))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
            for _ in range(5):
                assert reply(explorer, dict(kind="view", state=given))["kind"] == "view"
            spent = (resource.getrusage(resource.RUSAGE_SELF).ru_utime - before) / 5
            print(f"{explorer.subjects[0].name} {name}: {1000 * spent:.0f} ms")
            assert spent < .1, (name, spent)


def test_models_of_several_stages_and_without_cls(two):
    torch.manual_seed(0)
    for name, options in (("swin_tiny_patch4_window7_224", dict(img_size=224)), ("pvt_v2_b0", {}), ("vit_base_patch16_siglip_224", dict(depth=2))):
        explorer = Explorer(timm.create_model(name, **options).eval())
        for block in (0, -1):
            side = explorer.view(block=block).sides[0]
            assert side.map.shape == side.labels.shape and np.isfinite(side["entropy"])
        answer = reply(explorer, dict(kind="view", state=dict(query=[1, 1], block=-1)))
        assert answer["kind"] == "view" or "query" in answer["said"], answer


def test_layers_with_a_query_of_their_own_are_left_out_where_others_have_it():
    torch.manual_seed(0)
    small = dict(img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2)
    pool = timm.create_model("vit_tiny_patch16_224", global_pool="map", class_token=False, **small)
    cait = timm.create_model("cait_xxs24_224", **small)
    for model, last in ((pool, 2), (cait, 3)):
        explorer = Explorer(model, [np.zeros((32, 32, 3), np.uint8)], img_size=32)
        assert explorer.view().sides[0].block == last
        for query in ((1, 1), "mean"):
            assert [explorer.view(query=query, block=b).sides[0].block for b in (0, -1)] == [0, 1], query
            with pytest.raises(ValueError, match=f"block: got {last}"):
                explorer.view(query=query, block=last)
        with pytest.raises(ValueError, match=f"block: got 0, expected one of .*{last}. for this query"):
            explorer.view(query="cls", block=0)                      # only the last has one
        with pytest.raises(ValueError, match="patch of the 4×4 grid"):
            explorer.view(query=(9, 9))


@cache
def one():
    return Explorer()


@pytest.mark.parametrize("call,said", [
    (lambda: Explorer(torch.nn.Linear(1, 1)), "no adapter for this family"),
    (lambda: Explorer(timm.create_model("resnet18")), "a convolutional network: no attention"),
    (lambda: Explorer("nowhere_tiny"), "does not know"),
    (lambda: Explorer([se.demo_model()] * 3), "got 3 models, expected one, or two side by side"),
    (lambda: Explorer([]), "got 0 models"),
    (lambda: Explorer(images="nowhere"), "nowhere: no such folder or picture"),
    (lambda: Explorer(images=[]), "images: got an empty list"),
    (lambda: Explorer(images=3), "images: got int, expected a folder"),
    (lambda: one().view(picture=40), "picture: got 40, expected a number from 0 to 39"),
    (lambda: one().view(picture=-1), "picture: got -1"),
    (lambda: one().view(block=4), "block: got 4, expected a number from -4 to 3"),
    (lambda: one().view(head=3), "head: got 3, expected a number from -3 to 2 in block 3"),
    (lambda: one().view(head=(1, 1)), "head: got (1, 1), but there is one model"),
    (lambda: one().view(query=(14, 0)), "query: got (14, 0), expected a patch of the 14×14 grid"),
    (lambda: one().view(query="register"), "query: got 'register'"),
    (lambda: one().view(times_mean=float("nan")), "times_mean: got nan"),
    (lambda: one().view(mass=0), "mass: got 0, expected a share in (0, 1]"),
    (lambda: one().view(connectivity=6), "connectivity: got 6, expected 4 or 8"),
    (lambda: one().view(colour=6), "got 'colour', expected one of picture"),
    (lambda: as_state(dict(query=[[1], 2])), "query: got ([1], 2)"),
])
def test_what_cannot_be_is_one_sentence(call, said):
    with pytest.raises((ValueError, TypeError, OSError)) as e:
        call()
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_folder_holds_the_same_pictures_for_draw_and_explore(tmp_path):
    "Those below too, hidden ones and what is no picture not; with masks, the images that have one."
    from spatial_entropy.commands import _spread
    picture = Image.fromarray(np.full((16, 16, 3), 90, np.uint8))
    for name in ("plain/b.png", "plain/cats/a.jpg", "plain/.cache/x.png", "plain/__MACOSX/y.png", "both/images/1.png", "both/images/2.png", "both/images/3.png",
                 "both/masks/1.png", "both/masks/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name)
    for file in tmp_path.glob("both/masks/*"):
        Image.fromarray(np.tri(16, dtype=np.uint8) * 255).save(file)
    (tmp_path / "plain/notes.txt").write_text("x")
    drawn = {kind: [Path(p).relative_to(tmp_path / kind).as_posix() for p in _spread([tmp_path / kind])] for kind in ("plain", "both")}
    assert drawn == {"plain": ["b.png", "cats/a.jpg"], "both": ["images/1.png", "images/3.png"]}
    assert [item.name for item in items_of(tmp_path / "plain", 64)] == drawn["plain"]
    assert [item.name for item in items_of(tmp_path / "both", 64)] == [Path(p).stem for p in drawn["both"]]


def test_a_folder_without_pictures(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="no picture in it; expected files such as .png"):
        items_of(tmp_path, 64)
    (tmp_path / "broken.png").write_bytes(b"x")
    with pytest.raises(OSError, match="broken.png"):
        Explorer(images=tmp_path)


def test_questions_of_any_kind_have_an_answer():
    explorer, file = Explorer(), io.BytesIO()
    se.shapes(1, size=50)[0][0].save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    answer = reply(explorer, dict(kind="picture", name="x\n<b>.png", data=data, state=dict(block=1), n=7))
    assert answer["n"] == 7 and answer["pictures"][-1] == "x�<b>.png" and answer["state"]["picture"] == 40 and answer["mask"] is None
    assert json.loads(json.dumps(answer)) == answer
    for what, start in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml"), ("json", b"{"), ("py", b"import")):
        file = reply(explorer, dict(kind="export", what=what, state=dict(query=[3, 4])))
        assert base64.b64decode(file["data"]).startswith(start) and file["name"] == f"view.{what}"
    numbers = json.loads(file_of(explorer.view(picture=4), "json"))
    assert numbers["models"][0]["entropy"] == explorer.view(picture=4).sides[0]["entropy"]
    for wrong in ({}, None, [], dict(kind="view", state=3), dict(kind="view", state=dict(head=[1])), dict(kind="picture", data="é"), dict(kind="picture"),
                  dict(kind="export"), dict(kind="view", state=dict(picture=10**30)), dict(kind=["view"])):
        answer = reply(explorer, wrong)
        assert answer["kind"] == "error" and answer["said"] and "\n" not in answer["said"], wrong


def test_maps_with_nan_are_said_to_be_broken():
    model = se.demo_model()
    with torch.no_grad():
        model.blocks[3].attn.qkv.weight[:] = float("nan")
    explorer = Explorer.__new__(Explorer)
    explorer.__init__(model)
    answer = reply(explorer, dict(kind="view"))
    assert answer["sides"][0]["entropy"] is None and "NaN" not in json.dumps(answer)


def test_a_model_stays_in_the_mode_it_had():
    model = timm.create_model("vit_tiny_patch16_224", **VIT, drop_path_rate=.5)
    model.blocks[0].eval()
    was = [m.training for m in model.modules()]
    explorer = Explorer(model, "shapes")
    assert [m.training for m in model.modules()] == was
    once, again = (Explorer(model, "shapes").view(picture=3).sides[0].maps for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)               # no random depth while it looks
    assert explorer.subjects[0].model is model and [m.training for m in model.modules()] == was


VIEWS = r"""
import fs from "fs";
const part = () => ({children: [], dataset: {}, append() {}, replaceChildren() {}, addEventListener() {}, setAttribute(k, v) { this[k] = v; },
                     removeAttribute(k) { delete this[k]; }, querySelector: part});
globalThis.document = {createElement: part, createElementNS: part};
const source = fs.readFileSync(process.argv[2], "utf8").replace("class Explorer", "globalThis.Explorer = class Explorer");
(0, eval)(source.replace("export default {render}", "globalThis.render = render").replace("PATIENCE = 20000", "PATIENCE = 50"));
const told = [], sent = [], shown = [];
const model = {send: m => sent.push(m), on: (what, f) => told.push(f), off: (what, f) => told.splice(told.indexOf(f), 1)};
Object.assign(Explorer.prototype, {fill() {}, show(answer) { shown.push([this.hear === told[0] ? "A" : "B", answer.whose]); }});
const close = render({model, el: part()}), B = new Explorer(model, part());
const answer = (question, whose) => [...told].forEach(tell => tell({kind: "view", whose, n: question.n}));
answer(sent[0], "A"); answer(sent[1], "B");
const listening = [told.length];
close();
listening.push(told.length);
B.set({head: 2});
setTimeout(() => console.log(JSON.stringify({shown, listening, said: B.error.textContent, waiting: B.waiting})), 300);
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_views_of_one_widget_do_not_mix_and_say_when_no_answer_comes(tmp_path):
    (tmp_path / "views.mjs").write_text(VIEWS)
    code = Path(se.__file__).parent / "explorer.js"
    found = json.loads(subprocess.run(["node", tmp_path / "views.mjs", code], capture_output=True, text=True, check=True).stdout)
    assert found["shown"] == [["A", "A"], ["B", "B"]] and found["listening"] == [2, 1]
    assert "no answer from Python yet" in found["said"] and not found["waiting"]
