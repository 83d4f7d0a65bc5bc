"""Text encoders with random weights, and tokenizers that cut text into bytes: prompts are read offline.

Every text becomes the bytes of its UTF-8, so that no text is unknown and long templates stay long. The ids of special
tokens are given to the encoders' configurations; their embeddings have `VOCABULARY` rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import transformers as tr
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
MARKS = [
    "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<|object_ref_start|>", "<|endoftext|>", "[IMG]", "<image>", "<|system|>", "<|user|>", "<|assistant|>", "<sop>",
]  # fmt: skip
SPECIAL = [PAD, BOS, EOS, UNKNOWN, *MARKS]
VOCABULARY = 320
IDS = {token: index for index, token in enumerate(SPECIAL)}

# Whoever writes messages as lists of parts may mix texts and pictures; pictures become one token.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(
    length: int = 77, ends: bool = True, side: str = "right", bos: bool = False
) -> tr.PreTrainedTokenizerFast:
    """Tokenizer of bytes; texts end in EOS where `ends`, begin with BOS where `bos`, and are padded on `side`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    single = ([BOS] if bos else []) + ["$A"] + ([EOS] if ends else [])
    tokens = [(token, IDS[token]) for token in (BOS, EOS)]
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=tokens)
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    extra = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    made = tr.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=length,
        padding_side=side,
        chat_template=CHAT,
        extra_special_tokens=extra | {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"},
        **names,
    )
    return made


def clip_tokenizer(length: int = 77) -> tr.PreTrainedTokenizerFast:
    """Tokenizer in the manner of CLIP: BOS, text, EOS, cut at `length`."""
    return tokenizer(length, bos=True)


def random(kind: type, config: object) -> torch.nn.Module:
    """A model of transformers with random weights, the same at every call, in evaluation mode."""
    torch.manual_seed(0)
    return kind(config).eval()


TOKENS = {"pad_token_id": IDS[PAD], "bos_token_id": IDS[BOS], "eos_token_id": IDS[EOS], "vocab_size": VOCABULARY}


def clip(width: int = 32, projected: bool = False, length: int = 77, layers: int = 2) -> torch.nn.Module:
    """CLIP's text encoder; with a projection of the pooled token where `projected`."""
    config = tr.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=length,
        **TOKENS,
    )
    return random(tr.CLIPTextModelWithProjection if projected else tr.CLIPTextModel, config)


def clip_vision(width: int = 32, size: int = 32, patch: int = 8, projected: bool = True) -> torch.nn.Module:
    """CLIP's image encoder for pictures of `size`."""
    config = tr.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=patch,
    )
    return random(tr.CLIPVisionModelWithProjection if projected else tr.CLIPVisionModel, config)


def clip_pictures(size: int = 32) -> object:
    """What prepares pictures for `clip_vision`."""
    return tr.CLIPImageProcessorPil(crop_size=size, size=size)


def _t5(config: type, width: int, layers: int) -> object:
    return config(
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        **TOKENS,
    )


def t5(width: int = 32, layers: int = 2) -> torch.nn.Module:
    """T5's encoder."""
    return random(tr.T5EncoderModel, _t5(tr.T5Config, width, layers))


def umt5(width: int = 32, layers: int = 2) -> torch.nn.Module:
    """UMT5's encoder."""
    return random(tr.UMT5EncoderModel, _t5(tr.UMT5Config, width, layers))


def bert(width: int = 32) -> torch.nn.Module:
    """BERT."""
    names = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * width}
    return random(tr.BertModel, tr.BertConfig(**names, max_position_embeddings=512, **TOKENS))


def decoder(kind: type, config: type, width: int = 16, layers: int = 2, **more: object) -> torch.nn.Module:
    """A language model such as Llama, Gemma, Mistral or Qwen 3, of heads of 8 channels."""
    made = config(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 8,
        num_key_value_heads=width // 8,
        head_dim=8,
        max_position_embeddings=4096,
        **TOKENS | more,
    )
    return random(kind, made)


VISION_IDS = {
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
}


def qwen_vl(version: str = "2.5", width: int = 16, layers: int = 2, part: str = "generation") -> torch.nn.Module:
    """Qwen 2, 2.5 or 3 VL; `part` is "generation" (all of it), "model" or "text" (the language model alone)."""
    name = {"2": "Qwen2VL", "2.5": "Qwen2_5_VL", "3": "Qwen3VL"}[version]
    heads = 2
    text = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 8192,
        "rope_parameters": {"mrope_section": sections(width // heads), "rope_type": "default", "rope_theta": 1e6},
        **TOKENS,
    }
    if version == "3":
        text["head_dim"] = width // heads
    if part == "text":
        return random(getattr(tr, f"{name}TextModel"), getattr(tr, f"{name}TextConfig")(**text))
    sight = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    own = {
        "2": {"embed_dim": width, "hidden_size": width, "mlp_ratio": 2},
        "2.5": {"hidden_size": width, "intermediate_size": 2 * width, "out_hidden_size": width},
        "3": {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "out_hidden_size": width,
            "deepstack_visual_indexes": [0],
        },
    }[version]
    config = getattr(tr, f"{name}Config")(text_config=text, vision_config=sight | own, **VISION_IDS)
    return random(getattr(tr, f"{name}Model" if part == "model" else f"{name}ForConditionalGeneration"), config)


def sections(head: int) -> Sequence[int]:
    """How the half of a head's channels is split over time, height and width."""
    half = head // 2
    return [half - 2 * (half // 3), half // 3, half // 3]


class PictureReader:
    """What Qwen's processors do: every picture's token in a text becomes as many as the picture has patches.

    The processors of transformers want one for videos too, which want torchvision.
    """

    def __init__(self, patch: int = 14) -> None:
        self.image_processor = tr.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56, patch_size=patch)
        self.tokenizer = tokenizer(1024, ends=False)
        self.image_token = "<|image_pad|>"
        self.image_token_id = IDS[self.image_token]

    def __call__(
        self, text: object, images: object = None, videos: object = None, **kwargs: object
    ) -> tr.BatchFeature:
        """Token ids, masks, patches and their grids; `kwargs` are those of the tokenizer."""
        texts, seen = [text] if isinstance(text, str) else list(text), {}
        if images is not None:
            seen = dict(self.image_processor(images=images, return_tensors="pt"))
            counts = iter(int(grid.prod()) // self.image_processor.merge_size**2 for grid in seen["image_grid_thw"])
            texts = [self._expand(one, counts) for one in texts]
        words = self.tokenizer(texts, **{"return_tensors": "pt", **kwargs})
        if seen:
            seen["mm_token_type_ids"] = (words["input_ids"] == self.image_token_id).long()
        return tr.BatchFeature(dict(words) | seen)

    def _expand(self, text: str, counts: Iterator[int]) -> str:
        first, *rest = text.split(self.image_token)
        return first + "".join(self.image_token * next(counts) + part for part in rest)

    def apply_chat_template(self, *args: object, **kwargs: object) -> object:
        return self.tokenizer.apply_chat_template(*args, **kwargs)

    def decode(self, *args: object, **kwargs: object) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: object, **kwargs: object) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)
