"""A seed, a count or a threshold that is none is a sentence, wherever a public function takes one."""
import inspect

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import spatial_entropy as se
from spatial_entropy import _home
from spatial_entropy.analysis.intervals import bootstrap_both, sign_flip_test
from spatial_entropy.analysis.objects import best_overlaps
from spatial_entropy.analysis.robustness import corrupted, corruption_scores, occlusion_scores

NAMES = ("seed", "resamples", "thresholds", "n")
maps = torch.rand(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
masks, boxes = maps[:, 0] > .5, [torch.tensor([[0., 0, .5, .5]])] * 6
few = DataLoader(TensorDataset(torch.zeros(4, 3, 32, 32), torch.zeros(4).long()), 2)
norm = dict(mean=(.5,) * 3, std=(.5,) * 3)


@pytest.fixture(scope="module")
def model():
    return torch.nn.Linear(1, 1)                     # it is never asked: what was given is looked at first


def given(model):
    "{function: arguments with which only a wrong number is wrong}."
    pairs = list(zip(torch.zeros(6, 3, 112, 112), masks))
    return {
        se.bootstrap: ([1, 2, 3.],), bootstrap_both: (np.ones((3, 4)),), sign_flip_test: ([1, 2, 3.],),
        se.entropy_against_chance: (maps,), se.surrogate_maps: (maps,), se.shapes: (), se.colored_shapes: (),
        se.loaders: (), se.score_maps: (maps, masks), se.score_boxes: (maps, boxes),
        se.score_objects: (se.demo_model(), pairs), se.score_box_pairs: (se.demo_model(), list(zip(torch.zeros(6, 3, 112, 112), boxes))),
        se.corruption_accuracy: (model, few, *norm.values()), se.occlusion_curves: (model, few),
        corrupted: (se.shapes(1).images[0], "fog", 1), best_overlaps: (maps[0, 0], boxes[0]),
    }


ELSEWHERE = {"TrainConfig", "draw_extremes"}         # its own ranges; wants scores


def test_no_public_function_is_missing(model):
    "Whoever adds a function with a seed adds it here."
    known = {f.__name__ for f in given(model)} | ELSEWHERE
    for name in _home:
        thing = getattr(se, name)
        try: parameters = inspect.signature(thing).parameters
        except (TypeError, ValueError): continue
        assert name in known or not {*NAMES} & {*parameters}, name


@pytest.mark.parametrize("name,wrong", [("seed", w) for w in ("a", -1, 1.5, None, True, 2**64)] + [("resamples", w) for w in (0, "many", 2.5)]
                         + [("thresholds", w) for w in ("half", [], [2.], [float("nan")], .5)] + [("n", w) for w in (0, "a", 1.5)])
def test_what_is_none_is_a_sentence(name, wrong, model):
    asked = 0
    for function, arguments in given(model).items():
        parameters = list(inspect.signature(function).parameters)
        if name not in parameters: continue
        keywords = dict(zip(parameters, arguments)) | {name: wrong}
        with pytest.raises(ValueError, match=rf"{name}: got .*, expected "): function(**keywords)
        asked += 1
    assert asked >= 2


@pytest.mark.parametrize("scores", (corruption_scores, occlusion_scores))
def test_what_evaluate_takes_is_looked_at_at_once(scores):
    with pytest.raises(ValueError, match="seed: got 'a', expected a whole number"): scores(seed="a")


@pytest.mark.parametrize("wrong", (dict(names="fog"), dict(names=[]), dict(severities=1), dict(severities="1")))
def test_one_corruption_is_a_list_too(model, wrong):
    [name] = wrong
    with pytest.raises(ValueError, match=f"{name}: got .*, expected a list of one or more"):
        se.corruption_accuracy(model, few, **norm, **wrong)


def test_numpy_numbers_are_numbers():
    for seed in (np.int64(3), np.uint8(3)):
        assert torch.equal(se.surrogate_maps(maps, 2, seed), se.surrogate_maps(maps, 2, 3))
        assert se.bootstrap([1, 2, 3.], seed=seed) == se.bootstrap([1, 2, 3.], seed=3)
        assert np.array_equal(se.shapes(2, seed=seed).images, se.shapes(2, seed=3).images)
    for each in (np.arange(6), torch.arange(6), tuple(range(6))):
        assert torch.equal(se.surrogate_maps(maps, 2, each), se.surrogate_maps(maps, 2, list(range(6))))
    large = corrupted(se.shapes(1).images[0], "glass_blur", 1, seed=2**40 + 3)
    assert np.array_equal(large, corrupted(se.shapes(1).images[0], "glass_blur", 1, seed=3))


@pytest.mark.parametrize("wrong", ("runs/r", few, None))
def test_what_is_no_model_is_told(wrong):
    "Also with model and loader in the other order."
    for measured in (lambda: se.corruption_accuracy(wrong, few, **norm), lambda: se.occlusion_curves(wrong, few),
                     lambda: se.SpatialEntropyRegularizer(wrong), lambda: se.rank_heads(wrong, few), lambda: se.accuracy(wrong, few),
                     lambda: se.AttentionTap(wrong), lambda: se.TextImageTap(wrong)):
        with pytest.raises(TypeError, match="model: got .*, expected an nn.Module"): measured()
