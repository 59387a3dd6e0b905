"""Files of random weights in llama.cpp's format, of the architecture that it calls nemotron_h_moe.

Codes are random, under scales that keep the activations near one. The speed of a product does not depend on its values,
but what is read depends on the experts that a token takes, and random routers spread tokens evenly over them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from nautilus.config import Attention, Config, Experts, Mamba
from nautilus.data.tokenizer import CONTROL, Tokenizer
from nautilus.runtime import UserError

FORMATS = ("Q4_0", "NVFP4", "MXFP4", "IQ4_NL", "Q4_K")
# Codes in a block, its bytes, and the root mean square of a random code's value before the scale of its block (for Q4_K
# before that of its sub-block, too).
BLOCK = {
    "Q4_0": (32, 18, 4.64), "Q5_0": (32, 22, 9.25), "IQ4_NL": (32, 18, 67.4),
    "Q4_K": (256, 144, 168.0), "MXFP4": (32, 17, 2.93), "NVFP4": (64, 36, 2.93),
}  # fmt: skip
# The 8-bit floats that scale NVFP4's blocks: 4 bits of exponent, 3 of mantissa, no sign; code 127 is no number.
UE4M3 = np.array([(8 + m) * 2.0 ** (e - 10) if e else m / 512 for e in range(16) for m in range(8)])[:127]
MATRIX_SCALE = 1 / 16  # NVFP4's second scale, one for a matrix or an expert


def write_gguf(
    path: Path, shape: Config, format: str, seed: int = 0, say: Callable[[str], None] = str,
    tokenizer: Tokenizer | None = None,
) -> None:  # fmt: skip
    """A model of that shape: linear matrices and embedding in `format`, the rest in float32. `say` hears of progress.
    Without a tokenizer its words are made up, enough for the server to read and write text, and it knows no chats.

    A matrix whose rows Q4_K's blocks of 256 do not divide is Q5_0, as llama-quantize has it. ValueError for a shape of
    other layers than Mamba, Attention and Experts, and for rows that the format's blocks do not divide.
    """
    try:
        import gguf
    except ImportError as bad:
        raise UserError("writing GGUF files needs the gguf package; pip install 'nautilus[bench]'") from bad
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    writer = gguf.GGUFWriter(beside, "nemotron_h_moe")
    write_settings(writer, shape)
    write_tokenizer(writer, shape.vocab, tokenizer) if tokenizer else write_vocabulary(writer, shape.vocab)
    listed = [(name, size, kind, stored(name, size, kind)) for name, size, kind in tensors(shape, format)]
    for name, _, kind, held in listed:
        quantised, dtype = (gguf.GGMLQuantizationType[kind], np.uint8) if kind in BLOCK else (None, np.float32)
        writer.add_tensor_info(name, held, np.dtype(dtype), math.prod(held) * np.dtype(dtype).itemsize, quantised)
    rng = np.random.default_rng(seed)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, size, kind, held in listed:
            say(f"{path.name}: {name}")
            writer.write_tensor_data(blocks(name, size, kind, held, rng) if kind in BLOCK else floats(kind, size, rng))
        writer.close()
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_settings(writer, shape: Config) -> None:
    """What a layer is follows from two lists: with heads of keys attention, with a hidden width experts, else Mamba."""
    kinds = {type(layer): layer for layer in shape.layers}
    if set(kinds) != {Mamba, Attention, Experts}:
        found = ", ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"nemotron_h_moe is made of Mamba, Attention and Experts, the shape of {found}; use those three"
        )
    mamba, attention, experts = kinds[Mamba], kinds[Attention], kinds[Experts]
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(len(shape.layers))
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_layer_norm_eps(shape.norm_eps)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv([attention.groups if layer == attention else 0 for layer in shape.layers])
    writer.add_key_length(attention.head_width)
    writer.add_value_length(attention.head_width)
    writer.add_ssm_conv_kernel(mamba.taps)
    writer.add_ssm_state_size(mamba.state)
    writer.add_ssm_group_count(mamba.groups)
    writer.add_ssm_inner_size(mamba.heads * mamba.head_width)
    writer.add_ssm_time_step_rank(mamba.heads)  # read as the number of heads
    writer.add_feed_forward_length([experts.hidden if layer == experts else 0 for layer in shape.layers])
    writer.add_expert_feed_forward_length(experts.hidden)
    writer.add_expert_shared_feed_forward_length(experts.shared)
    writer.add_expert_shared_count(1)
    writer.add_expert_count(experts.experts)
    writer.add_expert_used_count(experts.active)
    writer.add_expert_weights_norm(experts.normalise)
    writer.add_expert_weights_scale(experts.scale)
    if experts.latent:
        writer.add_moe_latent_size(experts.latent)


def write_vocabulary(writer, vocab: int) -> None:
    """Special tokens, the bytes, then made-up words."""
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    words = [f"\u2581w{number}" for number in range(vocab)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list((special + words)[:vocab])
    writer.add_token_scores([-float(rank) for rank in range(vocab)])
    writer.add_token_types(([2, 3, 3] + [6] * 256 + [1] * vocab)[:vocab])  # unknown, control, byte, normal
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_tokenizer(writer, vocab: int, tokenizer: Tokenizer) -> None:
    """Ours, whose words are split as Mistral's Tekken splits them, and its chat template."""
    model = json.loads(tokenizer.core.to_str())["model"]
    found = {id: word for word, id in tokenizer.core.get_vocab(with_added_tokens=True).items()}
    normal, control, shown, unused = 1, 3, 4, 5
    special = {tokenizer.control[word] for word, hidden in CONTROL if hidden and word in tokenizer.control}
    kinds = [
        control if id in special else shown if id in tokenizer.control_ids else normal if id in found else unused
        for id in range(vocab)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list([found.get(id, f"[unused {id}]") for id in range(vocab)])
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(tokenizer.eos)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.template)


def tensors(shape: Config, format: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, kind) of every tensor in the order of the file; the kind is a key of BLOCK or of `floats`."""
    listed = [
        ("token_embd.weight", (shape.vocab, shape.width), "linear"),
        ("output_norm.weight", (shape.width,), "ones"),
    ]
    listed.append(("output.weight", (shape.vocab, shape.width), "linear"))
    for index, layer in enumerate(shape.layers):
        parts = {"attn_norm.weight": ((shape.width,), "ones"), **parts_of(layer, shape.width)}
        listed += [(f"blk.{index}.{name}", size, kind) for name, (size, kind) in parts.items()]
    for name, size, kind in listed:
        if kind == "linear":
            yield name, size, "Q5_0" if format == "Q4_K" and size[-1] % 256 else format
            if format == "NVFP4" and takes_scale(name):
                yield name.replace(".weight", ".scale"), size[:-2] or (1,), "scale"
        else:
            yield name, size, kind


def parts_of(layer, width: int) -> dict[str, tuple[tuple[int, ...], str]]:
    if isinstance(layer, Mamba):
        inner, heads = layer.heads * layer.head_width, layer.heads
        channels = inner + 2 * layer.groups * layer.state
        return {
            "ssm_in.weight": ((inner + channels + heads, width), "linear"),
            "ssm_conv1d.weight": ((channels, layer.taps), "normal"),
            "ssm_conv1d.bias": ((channels,), "small"),
            "ssm_dt.bias": ((heads,), "step"),
            "ssm_a": ((heads, 1), "decay"),
            "ssm_d": ((heads, 1), "ones"),
            "ssm_norm.weight": ((layer.groups, inner // layer.groups), "ones"),
            "ssm_out.weight": ((width, inner), "linear"),
        }
    if isinstance(layer, Attention):
        queries, keys = layer.heads * layer.head_width, layer.groups * layer.head_width
        rows = {"attn_q.weight": queries, "attn_k.weight": keys, "attn_v.weight": keys}
        return {name: ((count, width), "linear") for name, count in rows.items()} | {
            "attn_output.weight": ((width, queries), "linear")
        }
    inside = layer.latent or width
    latent = {
        "ffn_latent_down.weight": ((inside, width), "linear"),
        "ffn_latent_up.weight": ((width, inside), "linear"),
    }
    return (latent if layer.latent else {}) | {
        "ffn_gate_inp.weight": ((layer.experts, width), "normal"),
        "exp_probs_b.bias": ((layer.experts,), "small"),
        "ffn_up_exps.weight": ((layer.experts, layer.hidden, inside), "linear"),
        "ffn_down_exps.weight": ((layer.experts, inside, layer.hidden), "linear"),
        "ffn_up_shexp.weight": ((layer.shared, width), "linear"),
        "ffn_down_shexp.weight": ((width, layer.shared), "linear"),
    }


def takes_scale(name: str) -> bool:
    """Whether llama.cpp applies NVFP4's second scale here; it has no place for those of the latent projections."""
    return name != "token_embd.weight" and "latent" not in name


def stored(name: str, size: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """The shape as it lies in the file: rows of bytes for a quantised tensor."""
    block, bytes, _ = BLOCK.get(kind, (1, 1, 1))
    if size[-1] % block:
        raise ValueError(f"{name} has rows of {size[-1]}, {kind} has blocks of {block}; choose another format or width")
    return (*size[:-1], size[-1] // block * bytes)


def floats(kind: str, size: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if kind == "step":  # softplus of it is a time step between 0.001 and 0.1
        step = np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), size))
        return (step + np.log(-np.expm1(-step))).astype(np.float32)
    if kind in ("ones", "scale"):
        return np.full(size, MATRIX_SCALE if kind == "scale" else 1, np.float32)
    if kind == "decay":
        return -rng.uniform(1, 16, size).astype(np.float32)
    std = {"small": 0.01, "normal": size[-1] ** -0.5}[kind]
    return std * rng.standard_normal(size, np.float32)


def blocks(name: str, size, kind: str, held: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random codes; where a code's values have no mean of 0, random signs of the scales see to that of the matrix."""
    _, bytes, spread = BLOCK[kind]
    data = rng.integers(0, 256, held, dtype=np.uint8)
    block = data.reshape(-1, bytes)
    scale = (1 if name == "token_embd.weight" else size[-1] ** -0.5) / spread
    if kind == "MXFP4":  # one of the two powers of two around it
        block[:, 0] = np.floor(127 + math.log2(scale) + rng.random(len(block)))
    elif kind == "NVFP4":  # four small floats, one for each 16 codes
        nearest = np.abs(UE4M3 - scale / (MATRIX_SCALE if takes_scale(name) else 1)).argmin()
        block[:, :4] = np.clip(nearest + rng.integers(-3, 4, (len(block), 4)), 1, 126)
    else:
        signed = rng.choice([-scale, scale], len(block)) * rng.uniform(0.5, 1.5, len(block))
        block[:, :2] = signed.astype("<f2").view(np.uint8).reshape(-1, 2)
        if kind == "Q4_K":  # d sc q - dmin m, q from 0 to 15: m = sc and dmin = 7.5 d take the mean away
            block[:, 2:4] = (7.5 * signed).astype("<f2").view(np.uint8).reshape(-1, 2)
            block[:, 8:12] = block[:, 4:8]
            block[:, 12:16] = (block[:, 12:16] & 15) * 17
    return data
