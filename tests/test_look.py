"""`spatial-entropy look` and `se.look`: a small model in a folder, as one would get it; whatever is typed wrongly is one sentence."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_text_heads import TEMPLATE, picture_of, processor_of
from torch.testing import assert_close
from zoo_language import IMAGE, PAD, SPECS, made

import spatial_entropy as se
from spatial_entropy.commands import main
from spatial_entropy.language.demo import demo_language_model, questions
from spatial_entropy.language.looking import heads_of, query_of
from spatial_entropy.training.files import to_install

PROMPT = "where is the red mug ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and its processor, one with a model alone, one with a text model, and pictures."""
    import transformers as t
    root = tmp_path_factory.mktemp("look")
    model = made(SPECS[0])
    kept = model.generation_config.to_dict()
    model.generation_config.update(suppress_tokens=[IMAGE], pad_token_id=PAD)
    for name in ("vlm", "bare"): model.save_pretrained(root / name)
    model.generation_config = t.GenerationConfig.from_dict(kept)
    processor_of().save_pretrained(root / "vlm")
    processor_of(chat_template=TEMPLATE).save_pretrained(root / "templated")
    model.save_pretrained(root / "templated")
    processor_of().tokenizer.save_pretrained(root / "words")
    alone = t.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    t.LlamaForCausalLM(alone).save_pretrained(root / "words")
    picture_of().save(root / "mug.png")
    (root / "text.png").write_text("no picture")
    (root / "empty").mkdir()
    return root


@pytest.fixture
def typed(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*words):
        try: code = main([str(w) for w in words])
        except SystemExit as e: code = e.code
        return code, *capsys.readouterr()
    return run


def test_look_writes_a_picture_and_numbers(folder, typed):
    code, said, err = typed("look", "vlm", "mug.png", "--prompt", PROMPT, "--query", "the red mug", "--box", 32, 0, 32, 32, "--new-tokens", 3)
    assert code == 0 and not err, err
    assert said.startswith("answer: ") and "look.png: heads " in said and "of 8; numbers: look.json" in said
    assert np.asarray(Image.open(folder / "look.png")).std() > 10
    found = json.loads((folder / "look.json").read_text(encoding="utf-8"))
    assert found["model"] == "vlm" and found["prompt"] == PROMPT and found["grid"] == [4, 4] and len(found["heads"]) == 8
    assert found["frame"] == pytest.approx([1 / 6, 0, 5 / 6, 1]) and 0 <= found["scores"]["iou"] <= 1 and found["scores"]["iou_chance"] is None
    x0, y0, x1, y1 = found["box_pixels"]
    assert 16 <= x0 < x1 <= 80 and 0 <= y0 < y1 <= 64
    assert len(found["chosen"]) <= 3 and all(row["selected"] == 1 for row in found["chosen"])


@pytest.mark.parametrize("query", ["last", "generated", "-2", "2:5", "-3:", "red mug"])
def test_every_form_of_a_query(folder, typed, query):
    code, said, err = typed("look", "vlm", "mug.png", "-p", PROMPT, f"--query={query}", "-o", "q.svg", "--new-tokens", 2)
    assert code == 0, err
    assert "note: " not in said or query == "2:5" and "do not see up to" in said
    assert (folder / "q.svg").read_text(encoding="utf-8").lstrip().startswith("<?xml") and json.loads((folder / "q.json").read_text(encoding="utf-8"))["query"]


def test_chosen_heads_and_layers(folder, typed):
    assert typed("look", "templated", "mug.png", "-p", PROMPT, "--heads", "1.3", "0.2", "-o", "h.png", "--level", .5)[0] == 0
    found = json.loads((folder / "h.json").read_text(encoding="utf-8"))
    assert [(r["block"], r["head"]) for r in found["chosen"]] == [(1, 3), (0, 2)]
    assert typed("look", "vlm", "mug.png", "-p", PROMPT, "--layers", "-1", "-o", "h.png")[0] == 0
    assert {r["block"] for r in json.loads((folder / "h.json").read_text(encoding="utf-8"))["heads"]} == {1}


@pytest.mark.parametrize("line,said", [
    ("vlm mug.png", "the following arguments are required: -p/--prompt"),
    ("vlm -p where?", "the following arguments are required: image"),
    ("vlm mug.png --prompt=", "prompt: got an empty text"),
    ("vlm nowhere.png -p where", "nowhere.png: no such file"),
    ("vlm text.png -p where", "text.png: not a picture that can be read"),
    ("vlm empty -p where", "empty: is a folder"),
    ("nowhere mug.png -p where", "nowhere: no vision-language model and processor of transformers"),
    ("some/where mug.png -p where", "some/where: no vision-language model and processor"),
    ("./nowhere mug.png -p where", "./nowhere: no such folder with a model"),
    ("empty mug.png -p where", "empty: no vision-language model and processor"),
    ("bare mug.png -p where", "bare: no vision-language model and processor"),
    ("words mug.png -p where", "words: no vision-language model and processor|words: its processor"),
    ("vlm mug.png -p where --query mug", "query: 'mug' is 0 times in the prompt, expected once"),
    ("vlm mug.png -p where --query 99", "query: got token 99, expected one from"),
    ("vlm mug.png -p where --query=90:95", "names none of the"),
    ("vlm mug.png -p where --layers 7", "layers: got \\[7\\], expected a number from -2 to 1"),
    ("vlm mug.png -p where --layers seven", "invalid int value: 'seven'"),
    ("vlm mug.png -p where --heads 3", "heads: got 3, expected LAYER.HEAD"),
    ("vlm mug.png -p where --heads 1.9", "heads: got 1.9, expected heads of layers 0"),
    ("vlm mug.png -p where --box 90 0 20 20", "inside of it"),
    ("vlm mug.png -p where --box 1 2 3", "expected 4 arguments"),
    ("vlm mug.png -p where --view tile", "view: got 'tile', expected one of 'image 0'"),
    ("vlm mug.png -p where --view 3", "view: got 'image 3', expected one of 'image 0'"),
    ("vlm mug.png -p where --best 0", "best: got 0, expected at least 1"),
    ("vlm mug.png -p where --new-tokens 0", "new_tokens: got 0, expected at least 1"),
    ("vlm mug.png -p where --level 1", "level: got 1.0, expected from 0 to below 1"),
    ("vlm mug.png -p where --level nan", "level: got nan"),
    ("vlm mug.png -p where --device abacus", "device: got 'abacus'"),
    ("vlm mug.png -p where -o look.txt", "expected .png, .pdf or .svg"),
    ("vlm mug.png -p where -o no/look.png", "no such folder to write look.png into"),
    ("vlm mug.png -p where --colour red", "unrecognized arguments: --colour red"),
])
def test_what_is_typed_wrongly_is_one_sentence(folder, typed, line, said):
    import re
    before = sorted(os.listdir(folder))
    code, out, err = typed("look", *line.split())
    assert code == 2 and re.search(said, err) and err.count("\n") == 1 and not out, (code, out, err)
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("line", ["look vlm nowhere.png -p where", "look ./nowhere mug.png -p where", "draw vit_tiny nowhere.png -o a.png"])
def test_a_name_that_is_not_there_does_not_wait_for_torch(folder, line):
    code = f"import sys; from spatial_entropy.commands import main; code = main({line.split()!r}); print(code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, encoding="utf-8")
    assert done.stdout.split() == ["2", "False"] and "nowhere" in done.stderr and "no such" in done.stderr


def test_without_transformers(typed, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = typed("look", "vlm", "mug.png", "-p", "where")
    assert code == 2 and f"look needs transformers, which is not installed; {to_install('transformers')}" in err and err.count("\n") == 1


def test_look_is_what_text_maps_hears():
    model, processor, picture = made(SPECS[0]), processor_of(), picture_of()
    model.generation_config.suppress_tokens = [IMAGE]
    try: found = se.look(model, processor, picture, PROMPT, "the red mug", heads=[(1, 2)], new_tokens=3)
    finally: model.generation_config.suppress_tokens = None
    record = dict(image=picture, expression="the red mug")
    [seen] = se.text_maps(model, [record], processor, "expression", prompt="where is {} ?")
    assert_close(found.located.seen.stacked, seen.stacked)
    [located] = se.locate(model, [record], [(1, 2)], processor, "expression", prompt="where is {} ?")
    assert_close(found.located.map, located.map)
    assert found.located.box.tolist() == located.box.tolist() and "where is the red mug ?" in repr(found)


def qwen_processor():
    """A processor of Qwen2-VL, made here: pictures in their own size, a chat template."""
    import transformers as t
    from tokenizers import Tokenizer, models, pre_tokenizers
    own = "<|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|>".split()
    words = ["<pad>", "<s>", "</s>", *PROMPT.split(), *own]
    assert words[IMAGE] == own[0]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = t.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", additional_special_tokens=own)
    tokens.image_token, tokens.video_token = own[:2]
    cut = dict(patch_size=8, merge_size=2, temporal_patch_size=2)
    eye = t.Qwen2VLImageProcessor(size=dict(shortest_edge=16, longest_edge=10**6), **cut)
    template = TEMPLATE.replace("<image> ", "<|vision_start|><|image_pad|><|vision_end|>")
    return t.Qwen2VLProcessor(eye, tokens, t.Qwen2VLVideoProcessor(**cut), chat_template=template)


def test_a_model_of_any_size_of_picture_from_the_card_to_the_picture():
    model, processor, picture = made(next(s for s in SPECS if "qwen2_vl" in s.name)), qwen_processor(), picture_of((96, 64))
    content = [dict(type="image", image=picture), dict(type="text", text=PROMPT)]
    inputs = processor.apply_chat_template([dict(role="user", content=content)], add_generation_prompt=True, tokenize=True, return_dict=True,
                                           return_tensors="pt")
    with se.TextImageTap(model, "red mug", tokenizer=processor) as tap:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    maps = tap.maps()
    assert maps[1].shape == (1, 4, 4, 6)                                          # 64 × 96 pixels, 16 a token
    found = se.look(model, processor, picture, PROMPT, "red mug", heads=[(1, 2)], smooth=0, new_tokens=2)
    assert_close(found.located.map, maps[1][0, 2].double())
    assert found.located.seen.frame == (0, 0, 1, 1) and found.draw()._repr_png_()[:4] == b"\x89PNG"


def test_a_head_below_zero_is_refused_before_it_is_drawn():
    model, processor = demo_language_model()
    [asked] = questions(1)
    with pytest.raises(ValueError, match="heads: got .*3, -1.*counted from 0"):
        se.look(model, processor, Image.fromarray(asked.picture), asked.text, heads=[(3, -1)])


def test_what_is_typed_is_read():
    assert query_of("12") == 12 and query_of("-1") == -1 and query_of(":3") == slice(None, 3) and query_of("1:") == slice(1, None)
    assert query_of("a 1") == "a 1" and query_of("1.5") == "1.5" and heads_of(["0.0"]) == [(0, 0)]
    for wrong in (["1"], ["1.2", "a.b"], ["1.-2"]):
        with pytest.raises(ValueError, match="expected LAYER.HEAD"): heads_of(wrong)


def test_model_and_processor_in_the_other_order_is_a_sentence():
    model, processor = demo_language_model()
    picture, ask = Image.new("RGB", (64, 64)), "which colour is the disc ?"
    for given, said in (((processor, model), "processor: got LlavaForConditionalGeneration, a model; the model comes first"),
                        ((processor, processor), "model: got LlavaProcessor, expected an nn.Module"), (("vlm", processor), "model: got str, expected")):
        with pytest.raises(TypeError, match=said): se.look(*given, picture, ask)
    for read in (lambda: se.TextImageTap(processor), lambda: list(se.text_maps(processor, [dict(image=picture, expression="disc")], processor))):
        with pytest.raises(TypeError, match="model: got LlavaProcessor, expected an nn.Module"): read()
