"""Tiny text encoders of transformers, of random weights: what pipelines of diffusers read texts with."""

import torch
import transformers as tr

IDS = torch.tensor([[1, 7, 8, 9, 2], [1, 4, 4, 3, 2]])
SIZES = dict(vocab_size=30, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
WIDE = SIZES | dict(intermediate_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def t5(gated=True):
    """An encoder whose table of embeddings has two names, and whose `wo` transformers keeps in float32."""
    kind = "gated-gelu" if gated else "relu"
    sizes = dict(vocab_size=30, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj=kind)
    return tr.T5EncoderModel(tr.T5Config(**sizes))


def umt5():
    return tr.UMT5EncoderModel(tr.UMT5Config(vocab_size=30, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4))


def clip():
    return tr.CLIPTextModel(tr.CLIPTextConfig(**WIDE, max_position_embeddings=16))


def projected():
    return tr.CLIPTextModelWithProjection(tr.CLIPTextConfig(**WIDE, max_position_embeddings=16, projection_dim=32))


def gemma():
    """A language model whose head is its table of embeddings."""
    return tr.Gemma2ForCausalLM(tr.Gemma2Config(**WIDE, num_key_value_heads=2, head_dim=16))


def qwen2(tied=False):
    config = tr.Qwen2Config(**WIDE, num_key_value_heads=2, tie_word_embeddings=tied)
    return tr.Qwen2ForCausalLM(config)


def qwen_vl():
    """A language model with a head of its own and a tower for pictures; transformers writes their older names."""
    rope = {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"}
    text = WIDE | dict(num_key_value_heads=2, max_position_embeddings=64, rope_scaling=rope)
    eye = dict(
        depth=2, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=64, fullatt_block_indexes=[1]
    )
    tokens = dict(image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6)
    config = tr.Qwen2_5_VLConfig(text_config=text, vision_config=eye, vocab_size=30, **tokens)
    return tr.Qwen2_5_VLForConditionalGeneration(config)


ENCODERS = {one.__name__: one for one in (t5, umt5, clip, projected, gemma, qwen2, qwen_vl)}


def encoder(kind, dtype=torch.float32):
    """One of ENCODERS, the same for the same kind; loaded in a dtype as transformers does."""
    torch.manual_seed(0)
    return ENCODERS[kind]().to(dtype).eval()


@torch.no_grad()
def answer(model):
    """What an encoder makes of two texts: its first answer, [2, 5, ...] or pooled, in float32."""
    return model(IDS % 3 + 7 if "VL" in type(model).__name__ else IDS)[0].float()
