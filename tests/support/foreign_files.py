"""Files of quantized models as other tools write them, packed here from the byte layouts alone, in numpy.

A packer takes a weight [N, K] float32 and gives what the file holds of it, and the float64 weight of that.
"""

import json
import struct

import numpy as np
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import save_file

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
HEADER = {"format": "pt"}


def flux2(seed=0):
    """A FLUX.2 transformer of one block of each kind, 256 wide, whose linear layers have no biases."""
    torch.manual_seed(seed)
    return Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=8,
        joint_attention_dim=256, timestep_guidance_channels=256, axes_dims_rope=(8, 8, 8, 8), mlp_ratio=1.0,
    ).eval()  # fmt: skip


def run_flux2(model, seed=3):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.zeros(1, 12, 4)
    ids[0, :, 1] = torch.arange(12)
    with torch.no_grad():
        return model(
            torch.randn(1, 12, 16, generator=draw), torch.randn(1, 5, 256, generator=draw), torch.tensor([0.3]),
            ids, torch.zeros(1, 5, 4), torch.tensor([2.0]), return_dict=False,
        )[0]  # fmt: skip


def original_names(model):
    """The state of a `flux2` by its original names; q, k and v joined, scale and shift swapped."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    double, single = "transformer_blocks.0.", "single_transformer_blocks.0."
    names = {
        "img_in.weight": "x_embedder.weight",
        "txt_in.weight": "context_embedder.weight",
        "final_layer.linear.weight": "proj_out.weight",
        "single_blocks.0.linear1.weight": f"{single}attn.to_qkv_mlp_proj.weight",
        "single_blocks.0.linear2.weight": f"{single}attn.to_out.weight",
        "single_blocks.0.norm.query_norm.scale": f"{single}attn.norm_q.weight",
        "single_blocks.0.norm.key_norm.scale": f"{single}attn.norm_k.weight",
    }
    for old, new in (("time_in", "timestep_embedder"), ("guidance_in", "guidance_embedder")):
        for part, number in (("in_layer", 1), ("out_layer", 2)):
            names[f"{old}.{part}.weight"] = f"time_guidance_embed.{new}.linear_{number}.weight"
    for one in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        names[f"{one}.lin.weight"] = f"{one}.linear.weight"
    streams = {"img": ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k", "ff"),
               "txt": ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k",
                       "ff_context")}  # fmt: skip
    found = {}
    for stream, (q, k, v, out, norm_q, norm_k, ff) in streams.items():
        block = f"double_blocks.0.{stream}"
        found[f"{block}_attn.qkv.weight"] = np.concatenate([state[f"{double}attn.{x}.weight"] for x in (q, k, v)])
        names[f"{block}_attn.proj.weight"] = f"{double}attn.{out}.weight"
        names[f"{block}_attn.norm.query_norm.scale"] = f"{double}attn.{norm_q}.weight"
        names[f"{block}_attn.norm.key_norm.scale"] = f"{double}attn.{norm_k}.weight"
        names[f"{block}_mlp.0.weight"] = f"{double}{ff}.linear_in.weight"
        names[f"{block}_mlp.2.weight"] = f"{double}{ff}.linear_out.weight"
    found |= {old: state[new] for old, new in names.items()}
    found["final_layer.adaLN_modulation.1.weight"] = np.roll(state["norm_out.linear.weight"], 256, axis=0)
    return found


def e4m3(values):
    """The nearest e4m3 numbers, as torch rounds them -> (torch tensor, float64 of it)."""
    codes = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(torch.float8_e4m3fn)
    return codes, codes.double().numpy()


def comfy_fp8(w, config=None):
    scale = np.float32(np.abs(w).max() / 448)
    codes, values = e4m3(w / scale)
    return (
        {"weight": codes, "weight_scale": torch.tensor(scale)},
        values * float(scale),
        config or {"format": "float8_e4m3fn"},
    )


def bfl_fp8r(w):
    scale = (np.abs(w).max(1) / 448).astype(np.float32)
    codes, values = e4m3(w / scale[:, None])
    return {"weight": codes, "weight_scale": torch.from_numpy(scale)}, values * scale[:, None].astype(float), None


def comfy_int8(w):
    scale = (np.abs(w).max(1, keepdims=True) / 127).astype(np.float32)
    codes = np.rint(w / scale).astype(np.int8)
    stored = {"weight": torch.from_numpy(codes), "weight_scale": torch.from_numpy(scale)}
    return stored, codes * scale.astype(float), {"format": "int8_tensorwise"}


def regular_hadamard(size):
    first = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    H = first
    while len(H) < size:
        H = np.kron(H, first)
    return H


def turned(w, size):
    return (w.reshape(len(w), -1, size) @ regular_hadamard(size)).reshape(w.shape)


def comfy_int8_convrot(w, size=64):
    stored, values, config = comfy_int8(turned(w, size).astype(np.float32))
    return stored, turned(values, size), config | {"convrot": True, "convrot_groupsize": size}


def comfy_int4_convrot(w):
    """Codes of 4 bits, two's complement, the even input in the low half; groups of 256 go without saying."""
    w = turned(w, 256)
    scale = (np.abs(w).max(1) / 7).astype(np.float32)
    codes = np.rint(w / scale[:, None]).clip(-7, 7).astype(int)
    packed = (codes[:, 0::2] & 15 | (codes[:, 1::2] & 15) << 4).astype(np.uint8).view(np.int8)
    stored = {"weight": torch.from_numpy(packed), "weight_scale": torch.from_numpy(scale)}
    return stored, turned(codes * scale[:, None].astype(float), 256), {"format": "convrot_w4a4"}


def e2m1_groups(w):
    """(codes [N, K], scales e4m3 [N, K/16], outer, the float64 weight)."""
    n, k = w.shape
    outer = np.float32(np.abs(w).max() / (448 * 6))
    groups = w.reshape(n, -1, 16)
    scales, exact = e4m3(np.abs(groups).max(2) / 6 / outer)
    steps = groups / np.where(exact > 0, exact * outer, 1)[:, :, None]
    codes = np.abs(steps[..., None] - E2M1).argmin(-1)
    return codes.reshape(n, k), scales, outer, (E2M1[codes] * exact[:, :, None] * float(outer)).reshape(n, k)


def comfy_nvfp4(w):
    """The even input in the high half; scales in tiles of 128 rows by 4 columns of 16 bytes a row of 32."""
    codes, scales, outer, values = e2m1_groups(w)
    rows, columns = scales.shape
    wide, deep = -(-columns // 4) * 4, -(-rows // 128) * 128
    tiles = np.zeros(deep * wide, np.uint8)
    raw = scales.view(torch.uint8).numpy()
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * (wide // 4) + c // 4
            tiles[512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4] = raw[r, c]
    packed = (codes[:, 0::2] << 4 | codes[:, 1::2]).astype(np.uint8)
    blocked = torch.from_numpy(tiles.reshape(deep, wide)).view(torch.float8_e4m3fn)
    stored = {"weight": torch.from_numpy(packed), "weight_scale": blocked, "weight_scale_2": torch.tensor(outer)}
    return stored, values, {"format": "nvfp4"}


def bfl_nvfp4(w):
    codes, scales, outer, values = e2m1_groups(w)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    stored = {"weight": torch.from_numpy(packed), "weight_scale": scales, "weight_scale_2": torch.tensor(outer)}
    return stored | {"input_scale": torch.tensor(0.5)}, values, None


def comfy_awq(w):
    n, k = w.shape
    groups = w.reshape(n, -1, 64)
    low, high = groups.min(2), groups.max(2)
    scale = ((high - low) / 15).astype(np.float16)
    offset = (low + 8 * scale.astype(float)).astype(np.float16)
    steps = (groups - offset.astype(float)[:, :, None]) / scale.astype(float)[:, :, None]
    codes = np.clip(np.rint(steps) + 8, 0, 15).astype(int)
    values = (codes - 8) * scale.astype(float)[:, :, None] + offset.astype(float)[:, :, None]
    codes = codes.reshape(n, k)
    packed = torch.from_numpy((codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8).view(np.int8))
    stored = {"weight": packed, "weight_scale": torch.from_numpy(scale.T.copy())}
    stored["weight_zeros"] = torch.from_numpy(offset.T.copy())
    return stored, values.reshape(n, k), {"format": "awq_w4a16", "group_size": 64}


def save_comfy(path, state, packer, chosen, metadata="layer", prefix=""):
    """Write a state of numpy arrays, the weights that `chosen(name, array)` says by `packer`.

    metadata: where the JSON stands, with each "layer" or in the "header". Returns the float64 state.
    """
    tensors, exact, layers = {}, {}, {}
    for name, value in state.items():
        if not chosen(name, value):
            tensors[prefix + name], exact[name] = torch.from_numpy(np.array(value)), value.astype(float)
            continue
        stem = name.removesuffix(".weight")
        stored, exact[name], config = packer(value)
        tensors |= {f"{prefix}{stem}.{key}": one for key, one in stored.items()}
        if config is not None and metadata == "layer":
            tensors[f"{prefix}{stem}.comfy_quant"] = torch.tensor(
                list(json.dumps(config).encode()), dtype=torch.uint8
            )
        elif config is not None:
            layers[stem] = config
    header = HEADER | ({"_quantization_metadata": json.dumps({"layers": layers})} if layers else {})
    save_file(tensors, path, metadata=header)
    return exact


def matrices(name, value):
    """Weights whose rows divide into superblocks."""
    return name.endswith(".weight") and value.ndim == 2 and value.shape[1] % 256 == 0


# --- GGUF --------------------------------------------------------------------------------------------------------

Q8_0, Q4_K = 8, 12


def q8_0(w):
    """34 bytes for 32 values: float16 d, then int8."""
    blocks = w.reshape(-1, 32).astype(np.float32)
    d = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    q = np.clip(np.rint(blocks / np.where(d > 0, d.astype(np.float32), 1)), -127, 127).astype(np.int8)
    raw = b"".join(d[i].tobytes() + q[i].tobytes() for i in range(len(q)))
    return raw, (q * d.astype(float)).reshape(w.shape)


def q4_k(w):
    """144 bytes for 256 values: float16 D, M, 12 bytes of 6-bit scales and minima, 128 of codes."""
    raw, values = b"", []
    for block in w.reshape(-1, 8, 32).astype(float):
        low, high = np.minimum(block.min(1), 0), block.max(1)
        step, minimum = (high - low) / 15, -low
        D, M = np.float16(step.max() / 63), np.float16(minimum.max() / 63)
        t = np.rint(step / max(float(D), 1e-8)).clip(0, 63).astype(int)
        m = np.rint(minimum / max(float(M), 1e-8)).clip(0, 63).astype(int)
        s, o = float(D) * t, float(M) * m
        q = np.rint((block + o[:, None]) / np.where(s > 0, s, 1)[:, None]).clip(0, 15).astype(int)
        packed = [t[j] | t[j + 4] >> 4 << 6 for j in range(4)] + [m[j] | m[j + 4] >> 4 << 6 for j in range(4)]
        packed += [t[j + 4] & 15 | (m[j + 4] & 15) << 4 for j in range(4)]
        codes = [q[2 * c, i] | q[2 * c + 1, i] << 4 for c in range(4) for i in range(32)]
        raw += D.tobytes() + M.tobytes() + bytes(int(one) for one in packed + codes)
        values.append(s[:, None] * q - o[:, None])
    return raw, np.array(values).reshape(w.shape)


def _text(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def save_gguf(path, tensors, entries=b"", count=0, alignment=32, version=3):
    """Write {name: (shape, type, bytes)}; entries: more of them, packed already."""
    infos, data = b"", b""
    for name, (shape, kind, raw) in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        infos += _text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        infos += struct.pack("<IQ", kind, len(data))
        data += raw
    own = _text("general.architecture") + struct.pack("<I", 8) + _text("flux")
    own += _text("general.alignment") + struct.pack("<II", 4, alignment)
    own += _text("general.tags") + struct.pack("<IIQ", 9, 8, 2) + _text("a") + _text("b")
    start = b"GGUF" + struct.pack("<IQQ", version, len(tensors), 3 + count) + own + entries + infos
    path.write_bytes(start + b"\0" * (-len(start) % alignment) + data)


def save_gguf_state(path, state, kind, packer, chosen=matrices):
    """Write a state of numpy arrays, chosen weights in blocks, others float16. Returns the float64 state."""
    tensors, exact = {}, {}
    for name, value in state.items():
        if chosen(name, value):
            raw, exact[name] = packer(value)
            tensors[name] = (value.shape, kind, raw)
        else:
            half = value.astype(np.float16)
            tensors[name], exact[name] = (value.shape, 1, half.tobytes()), half.astype(float)
    save_gguf(path, tensors)
    return exact
