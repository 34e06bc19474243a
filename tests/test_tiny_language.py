"""The small model that is asked: it answers, its heads look at what is meant, and its weights are what the command makes."""
import numpy as np
import pytest
import torch
import transformers

import spatial_entropy as se
from spatial_entropy.analysis.grounding import as_truth, score_grounding
from spatial_entropy.data import COLORS, KINDS, colored_shapes
from spatial_entropy.language.demo import WORDS, Question, demo_config, inputs_of, questions


@pytest.fixture(scope="module")
def asked():
    return questions(120, seed=3)                          # pictures of no training and no page


@pytest.fixture(scope="module")
def demo():
    return se.demo_language_model()


@torch.no_grad()
def answers(demo, asked):
    model, processor = demo
    return [WORDS[i] for i in model(**inputs_of(processor, asked)).logits[:, -1].argmax(-1)]


def test_the_loader_gives_transformers_own_classes(demo):
    model, processor = demo
    assert type(model) is transformers.LlavaForConditionalGeneration and type(processor) is transformers.LlavaProcessor
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in model.parameters())


def test_missing_weights_are_named(tmp_path):
    from spatial_entropy.language.demo import demo_language_model
    with pytest.raises(FileNotFoundError, match="nothing.safetensors: no such file of weights"):
        demo_language_model(tmp_path / "nothing.safetensors")


def test_the_processor_reads_any_case_and_any_size(demo):
    _, processor = demo
    from PIL import Image
    ids = [processor(images=Image.new("RGB", size), text=text, return_tensors="pt")["input_ids"]
           for size, text in (((64, 64), "<image> which colour is the star ?"), ((200, 100), "<image>\nWhich colour is the star?"))]
    assert torch.equal(*ids) and ids[0].shape == (1, 1 + 64 + 6)
    assert processor.decode(ids[0][0, -2:]) == "star ?"


def test_pictures_hold_what_is_asked_for_once():
    for picture, things in colored_shapes(40, "val", 64, 3):
        assert picture.shape == (64, 64, 3) and len(things) in (2, 3)
        assert len({t.kind for t in things}) == len({t.color for t in things}) == len(things)
        assert {t.kind for t in things} <= set(KINDS) and {t.color for t in things} <= set(COLORS)
        assert sum(t.mask.astype(int) for t in things).max() == 1
        for t in things: assert np.abs(picture[t.mask].mean(0) / 255 - .9 * np.array(COLORS[t.color])).max() < .15


@pytest.mark.parametrize("about, least", [("colour", .8), ("shape", .7)])
def test_it_answers_questions_about_pictures_it_never_saw(demo, about, least):
    asked = questions(120, about=about, seed=3)
    right = np.mean([s == q.answer for s, q in zip(answers(demo, asked), asked)])
    assert right > least                                   # guessing among the things that are there: 0.42


def test_another_question_has_another_answer(demo, asked):
    turned = [Question(q.picture, q.others[0], (q.thing, *q.others[1:])) for q in asked]
    a, b = answers(demo, asked), answers(demo, turned)
    assert np.mean([x != y for x, y in zip(a, b)]) > .8
    assert np.mean([s == q.answer for s, q in zip(b, turned)]) > .8


def test_the_same_question_of_another_picture_has_its_answer(demo, asked):
    model, processor = demo
    inputs = inputs_of(processor, asked)
    rolled = inputs | dict(pixel_values=inputs["pixel_values"].roll(1, 0))
    with torch.no_grad(): said = [WORDS[i] for i in model(**rolled).logits[:, -1].argmax(-1)]
    assert np.mean([s == q.answer for s, q in zip(said, asked)]) < .45


def test_generation_ends_after_the_answer(demo, asked):
    model, processor = demo
    said = model.generate(**inputs_of(processor, asked[:8]), max_new_tokens=5, do_sample=False)[:, 71:]
    assert processor.batch_decode(said[:, :1]) == answers(demo, asked[:8])
    assert (said[:, 1] == WORDS.index("</s>")).all()


def test_some_head_looks_at_what_is_meant_and_the_tap_reads_it_truly(demo, asked):
    model, processor = demo
    with se.TextImageTap(model) as tap, torch.no_grad(): model(**inputs_of(processor, asked))
    maps = torch.cat([*tap.maps().values()], 1)            # (B, N, h, w)
    own = torch.stack([score_grounding(m, as_truth(q.thing.mask))["energy_pointing"] for m, q in zip(maps, asked)]).nanmean(0)
    others = torch.stack([score_grounding(m, as_truth(q.others[0].mask))["energy_pointing"] for m, q in zip(maps, asked)]).nanmean(0)
    best = own.argmax()
    assert own[best] > .4 and own[best] > 2 * others[best]
    with se.TextImageTap(model) as tap: assert max(tap.check(**inputs_of(processor, asked[:4])).values()) < 1e-5


def test_questions_that_are_packed_are_read_as_if_alone(demo, asked):
    import tiny_language as command
    model, processor = demo
    things = [[q.thing, *q.others] for q in asked[:6]]
    ids = torch.tensor([[command.turn(t[0], "colour"), command.turn(t[1], "shape")] for t in things])
    pictures = torch.tensor(np.stack([q.picture for q in asked[:6]])).permute(0, 3, 1, 2)
    with torch.no_grad():
        packed = command.spoken(model, command.features(model, pictures).float(), ids)[:, 0, 0]
        alone = model(**inputs_of(processor, asked[:6])).logits[:, -1]
    torch.testing.assert_close(packed, alone, atol=.05, rtol=0)      # what the tower says is kept in half precision


def test_a_very_small_training_is_measured_and_not_done_twice(tmp_path, monkeypatch, capsys):
    import tiny_language as command
    line = "--seeds 5 --pictures 64 --tower-steps 2 --steps 2 --questions 4".split()
    args = command.parser().parse_args([*line, "-o", str(tmp_path / "runs"), "--results", str(tmp_path / "results")])
    monkeypatch.setattr(command, "accuracies", lambda *_: {})
    command.prepare(args)()
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["seed5.json", "seed5.safetensors", "tower5.json", "tower5.safetensors"]
    found = (tmp_path / "results/seed5.json").read_text(encoding="utf-8")
    command.prepare(args)()
    assert (tmp_path / "results/seed5.json").read_text(encoding="utf-8") == found
    args.ship = 6
    with pytest.raises(ValueError, match="got 6, expected one of the seeds"): command.prepare(args)


def test_the_configuration_is_small():
    with torch.device("meta"): model = transformers.LlavaForConditionalGeneration(demo_config())
    assert sum(p.numel() for p in model.parameters()) * 2 < 3e6          # bytes in half precision
