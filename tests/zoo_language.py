"""Small copies of transformers' vision-language models: how each is built, and what its prompt holds of a picture."""
import re
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module

import torch

PAD, START, END, IMAGE, VIDEO = 0, 1, 2, 9, 10           # ids of the tiny vocabulary


@dataclass(frozen=True)
class Spec:
    """One class; `name` is "folder.Class"."""
    name: str
    config: object                                       # () -> its configuration
    prompt: object                                       # (picture) -> (ids, {input: tensor}); a picture is (3, height, width) in 0–1
    grid: tuple                                          # (h, w) of the view
    view: object = None                                  # that is asked for
    size: tuple = (32, 32)                               # of the picture
    near: float = 0.                                     # cells by which a tower's convolutions spread a patch
    prefix: bool = False                                 # the prompt sees itself, so that a text read at once is another one
    more: dict = field(default_factory=dict, hash=False)

    def __str__(self): return self.name

    @property
    def cls(self):
        folder, name = self.name.split(".")
        return getattr(import_module(f"transformers.models.{folder}.modeling_{folder}"), name)

    def given(self, seed=0, picture=None):
        """Inputs of one prompt."""
        if picture is None: picture = noise(self.size, seed)
        ids, more = self.prompt(picture)
        return dict(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **more)


@lru_cache(maxsize=2)                                    # tests of one model follow one another
def made(spec):
    """The model with random weights; those of its words are large enough that no attention is flat."""
    torch.manual_seed(0)
    model = spec.cls._from_config(spec.config(), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p), alpha=.02).mul_(4 if p.ndim > 1 and re.search("language_model|text_model", name) else 1)
    model.generation_config.update(pad_token_id=PAD, eos_token_id=None, bos_token_id=START)
    return model


def noise(size, seed=0):
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))


def text(**more):
    return dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
                max_position_embeddings=512, pad_token_id=PAD, bos_token_id=START, eos_token_id=END) | more


def tower(**more):
    return dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32) | more


def words(*image):
    """A prompt with image tokens, or whatever stands for them, among words."""
    return [START, 3, 4, *image, 5, 6, 7, 8]


def llava(cls="LlavaConfig", vision="CLIPVisionConfig", **more):
    def config():
        import transformers as t
        return getattr(t, cls)(vision_config=getattr(t, vision)(**tower()), text_config=t.LlamaConfig(**text()), image_token_id=IMAGE, **more)
    return config


def plain(n):
    """n tokens for a picture that comes as it is."""
    return lambda picture: (words(*[IMAGE] * n), dict(pixel_values=picture[None] * 4 - 2))


def paligemma():
    import transformers as t
    return t.PaliGemmaConfig(vision_config=t.SiglipVisionConfig(**tower(), projection_dim=32).to_dict(), image_token_id=IMAGE, projection_dim=32,
                             text_config=t.GemmaConfig(**text(head_dim=8)).to_dict())


SPECS = [
    Spec("llava.LlavaForConditionalGeneration", llava(), plain(16), (4, 4)),
    Spec("vipllava.VipLlavaForConditionalGeneration", llava("VipLlavaConfig", vision_feature_layers=[-2, -1]), plain(16), (4, 4)),
    Spec("paligemma.PaliGemmaForConditionalGeneration", paligemma,
         lambda picture: ([*[IMAGE] * 16, START, 5, 6, 7, 8], dict(pixel_values=picture[None] * 4 - 2, token_type_ids=torch.zeros(1, 21, dtype=torch.long))),
         (4, 4), prefix=True),
]
