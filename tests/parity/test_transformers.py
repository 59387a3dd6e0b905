"""The same weights in transformers and here: logits, greedy continuations, and files that open on both sides."""

import dataclasses
import json
import random

import pytest
import torch

from nautilus.config import Experts
from nautilus.model.language import Language
from nautilus.model.save import save_model
from nautilus.model.weights import load_model
from nautilus.presets import preset, shrink

transformers = pytest.importorskip("transformers")

SEEDS = range(24)
BOUND = 1e-5


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# ----- random small models -------------------------------------------------------------------------------------------


def random_settings(seed: int) -> dict:
    """Arguments for NemotronHConfig. The first model has every kind of layer."""
    draw = random.Random(seed)
    pattern = "MEM*E-ME" if seed == 0 else "".join(draw.choices("MME*-", k=draw.randint(3, 7)))
    groups, expert_groups = draw.choice((1, 2, 4)), draw.choice((1, 1, 2, 4))
    active_groups = draw.randint(1, expert_groups)
    kv = draw.choice((1, 2, 4))
    return {
        "vocab_size": 128,
        "hidden_size": draw.choice((32, 48, 64)),
        "hybrid_override_pattern": pattern,
        "num_attention_heads": kv * draw.choice((1, 2, 4)),
        "num_key_value_heads": kv,
        "head_dim": draw.choice((6, 10, 16)),
        "intermediate_size": draw.choice((40, 96)),
        "mamba_num_heads": groups * draw.choice((1, 2, 3)),
        "mamba_head_dim": draw.choice((8, 12)),
        "ssm_state_size": draw.choice((8, 16)),
        "n_groups": groups,
        "conv_kernel": draw.choice((4, 4, 3)),
        "chunk_size": 8,
        "n_routed_experts": 8,
        "num_experts_per_tok": draw.randint(1, active_groups * (8 // expert_groups)),
        "n_group": expert_groups,
        "topk_group": active_groups,
        "norm_topk_prob": draw.random() < 0.7,
        "moe_intermediate_size": draw.choice((16, 32)),
        "moe_shared_expert_intermediate_size": draw.choice((24, 48)),
        "moe_latent_size": draw.choice((None, 24)),
        "routed_scaling_factor": draw.choice((1.0, 2.5)),
        "layer_norm_epsilon": draw.choice((1e-5, 1e-3)),
        "max_position_embeddings": 1024,
    }


def test_the_random_models_cover_what_they_should():
    def features(seeds) -> set[str]:
        found = set()
        for s in map(random_settings, seeds):
            pattern = s["hybrid_override_pattern"]
            found |= set(pattern)
            found |= {"latent" if s["moe_latent_size"] else "full width"} if "E" in pattern else set()
            found |= {"expert groups"} if "E" in pattern and s["topk_group"] < s["n_group"] else set()
            found |= {"unnormalised"} if "E" in pattern and not s["norm_topk_prob"] else set()
            found |= {"state groups"} if "M" in pattern and s["n_groups"] > 1 else set()
            own_width = s["mamba_num_heads"] * s["mamba_head_dim"] != 2 * s["hidden_size"]
            found |= {"inner is not twice the width"} if "M" in pattern and own_width else set()
            head_width = s["num_attention_heads"] * s["head_dim"] != s["hidden_size"]
            found |= {"heads do not fill the width"} if "*" in pattern and head_width else set()
            grouped = s["num_key_value_heads"] < s["num_attention_heads"]
            found |= {"grouped queries"} if "*" in pattern and grouped else set()
            found |= {"no attention"} if "*" not in pattern else set()
        return found

    every = {"M", "E", "*", "-", "latent", "full width", "expert groups", "unnormalised", "state groups"}
    every |= {"inner is not twice the width", "heads do not fill the width", "grouped queries", "no attention"}
    assert features(SEEDS) == every
    assert len(SEEDS) >= 20


@torch.no_grad()
def randomise(model, seed: int, *, embedding: float = 1.0):
    """Weights of sizes at which every part matters and the clamp of dt would be noticed.

    A tied embedding is best below 1: it is the head as well, and errors grow with the logits.
    """
    g = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        normal, uniform = torch.randn(tensor.shape, generator=g), torch.rand(tensor.shape, generator=g)
        if name.endswith("inv_freq"):
            continue
        if name.endswith("dt_bias"):
            tensor.copy_(8 * uniform - 9)
        elif name.endswith("A_log"):
            tensor.copy_(2.7 * uniform)
        elif name.endswith(".D"):
            tensor.copy_(1 + 0.2 * normal)
        elif "norm" in name:
            tensor.copy_(1 + 0.1 * normal)
        elif name.endswith("conv1d.weight"):
            tensor.copy_(0.4 * normal)
        else:
            tensor.copy_((embedding if "embed" in name else 0.1) * normal)
    return model.eval()


def without_clamp(model):
    """transformers 5.23 takes time_step_min as a lower bound of dt and forgets any other on loading."""
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model


def nemotron(seed: int):
    config = transformers.NemotronHConfig(**random_settings(seed))
    return without_clamp(randomise(transformers.NemotronHForCausalLM(config), seed))


def tokens(seed: int, rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(1000 + seed))


@torch.no_grad()
def theirs(model, tokens_BT, **settings) -> torch.Tensor:
    return model(tokens_BT, use_cache=False, **settings).logits


@torch.no_grad()
def ours(model: Language, tokens_BT, **settings) -> torch.Tensor:
    return model(tokens_BT, **settings)[0]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def opened(kind, folder):
    """As transformers opens it; nothing may be missing or left over."""
    model, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


@torch.no_grad()
def greedy(model: Language, tokens_BT: torch.Tensor, steps: int) -> torch.Tensor:
    """One token at a time, carrying the state."""
    state, rest = None, tokens_BT
    for _ in range(steps):
        logits, state = model(rest, state=state)
        rest = logits[:, -1:].argmax(-1)
        tokens_BT = torch.cat([tokens_BT, rest], 1)
    return tokens_BT


# ----- Nemotron-H ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_of_a_saved_nemotron_are_the_same_here(seed, tmp_path):
    model = nemotron(seed)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    for length in (1, 8, 19 + seed, 45):  # one token, one chunk, more than two chunks and no multiple of one
        rows = tokens(seed, 2, length)
        assert distance(ours(loaded, rows), theirs(model, rows)) < BOUND, length


@pytest.mark.parametrize("seed", SEEDS)
def test_left_padding_changes_nothing_on_either_side(seed, tmp_path):
    model = nemotron(seed)
    model.save_pretrained(tmp_path)
    loaded, length = load_model(tmp_path), 21
    rows, padding = tokens(seed, 3, length), torch.tensor([0, 4, 13])
    real_BT = torch.arange(length) >= padding[:, None]
    rows = rows.where(real_BT, 0)
    padded = ours(loaded, rows, document_BT=real_BT.long())
    assert distance(padded[real_BT], theirs(model, rows, attention_mask=real_BT.long())[real_BT]) < BOUND
    alone = ours(loaded, rows[2:, 13:])
    assert distance(padded[2:, 13:], alone) < BOUND


@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_continuations_are_identical(seed, tmp_path):
    model = nemotron(seed)
    model.save_pretrained(tmp_path)
    prompt = tokens(seed, 2, 19)
    cached = "*" in random_settings(seed)["hybrid_override_pattern"]  # transformers cannot cache a stack without
    want = model.generate(
        prompt, max_new_tokens=12, do_sample=False, use_cache=cached, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(greedy(load_model(tmp_path), prompt, 12), want)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_saved_here_opens_there_with_the_same_logits(seed, tmp_path):
    model = nemotron(seed)
    model.save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours")
    again = opened(transformers.NemotronHForCausalLM, tmp_path / "ours")
    rows = tokens(seed, 2, 27)
    assert torch.equal(theirs(without_clamp(again), rows), theirs(model, rows))


def test_the_clamp_of_dt_is_there_and_is_all_the_difference(tmp_path):
    """The public reference departs from what the models were trained with; the day this fails, it was mended."""
    model = nemotron(0)
    model.save_pretrained(tmp_path)
    loaded, rows = load_model(tmp_path), tokens(0, 2, 37)
    stock = opened(transformers.NemotronHForCausalLM, tmp_path)
    assert distance(ours(loaded, rows), theirs(stock, rows)) > 30 * BOUND
    assert distance(ours(loaded, rows), theirs(without_clamp(stock), rows)) < BOUND


def test_what_is_saved_here_needs_no_mending_there(tmp_path):
    nemotron(0).save_pretrained(tmp_path / "theirs")
    loaded, rows = load_model(tmp_path / "theirs"), tokens(0, 2, 37)
    save_model(loaded, tmp_path / "ours")
    assert (
        distance(ours(loaded, rows), theirs(opened(transformers.NemotronHForCausalLM, tmp_path / "ours"), rows)) < BOUND
    )


def test_transformers_drops_the_prediction_block_and_we_keep_it(tmp_path):
    config = dataclasses.replace(shrink(preset("lightning"), layers=4, width=32), vocab=128)
    model = randomise(Language(config), 5)
    save_model(model, tmp_path, shard_bytes=20_000)
    rows = tokens(5, 2, 21)
    there = opened(transformers.NemotronHForCausalLM, tmp_path)
    assert distance(ours(model, rows), theirs(without_clamp(there), rows)) < BOUND
    assert not any("mtp" in name for name, _ in there.named_parameters())
    back = load_model(tmp_path).state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_a_tied_head_opens_there_with_the_same_logits(tmp_path):
    config = dataclasses.replace(shrink(preset("toy"), layers=4, width=32), vocab=128, tied=True)
    model = randomise(Language(config), 6, embedding=0.3)
    save_model(model, tmp_path)
    rows = tokens(6, 2, 21)
    there = without_clamp(opened(transformers.NemotronHForCausalLM, tmp_path))
    assert distance(ours(model, rows), theirs(there, rows)) < BOUND


def test_bf16_files_open_there_in_bf16_with_the_bias_in_float32(tmp_path):
    model = nemotron(0)
    model.save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours", precision="bf16")
    there = opened(transformers.NemotronHForCausalLM, tmp_path / "ours")
    types = {name: tensor.dtype for name, tensor in there.state_dict().items()}
    assert {dtype for name, dtype in types.items() if not name.endswith("correction_bias")} == {torch.bfloat16}
    assert {dtype for name, dtype in types.items() if name.endswith("correction_bias")} == {torch.float32}
    here, rows = load_model(tmp_path / "ours", dtype=torch.float32), tokens(0, 2, 27)
    assert distance(ours(here, rows), theirs(without_clamp(there.float()), rows)) < BOUND


@pytest.mark.parametrize("full", [False, True])
def test_every_key_that_transformers_writes_is_known(full, tmp_path):
    """save_pretrained writes what differs from the defaults; to_dict everything."""
    model = nemotron(0)
    model.save_pretrained(tmp_path)
    want = load_model(tmp_path).config
    if full:
        model.config.dtype = None
        (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    assert load_model(tmp_path).config == want


# ----- relatives -----------------------------------------------------------------------------------------------------

SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LLAMAS = {
    "plain": {"num_key_value_heads": 4},
    "grouped and scaled": {"num_key_value_heads": 2, "rope_parameters": SCALED},
    "one group, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide heads, tied and scaled": {"head_dim": 24, "tie_word_embeddings": True, "rope_parameters": SCALED},
}


def llama(name: str):
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0, **LLAMAS[name])
    return randomise(transformers.LlamaForCausalLM(config), len(name), embedding=0.3)


def qwen(**changes):
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 12}
    experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "norm_topk_prob": True}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = transformers.Qwen3MoeConfig(**sizes | experts | heads | changes)
    return randomise(transformers.Qwen3MoeForCausalLM(config), 9)


def check_both_ways(model, tmp_path):
    """Load what they saved, compare; save it, open it there, compare; continue greedily on both sides."""
    model.save_pretrained(tmp_path / "theirs")
    loaded, rows = load_model(tmp_path / "theirs"), tokens(1, 2, 90)
    assert distance(ours(loaded, rows), theirs(model, rows)) < BOUND
    save_model(loaded, tmp_path / "ours")
    assert torch.equal(theirs(opened(type(model), tmp_path / "ours"), rows), theirs(model, rows))
    want = model.generate(rows[:, :19], max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy(loaded, rows[:, :19], 12), want)
    real_BT = torch.arange(21) >= torch.tensor([0, 8])[:, None]
    padded = ours(loaded, rows[:, :21], document_BT=real_BT.long())
    assert distance(padded[real_BT], theirs(model, rows[:, :21], attention_mask=real_BT.long())[real_BT]) < BOUND


@pytest.mark.parametrize("name", LLAMAS)
def test_llama_models_agree_both_ways(name, tmp_path):
    check_both_ways(llama(name), tmp_path)


def test_the_rescaling_of_llama_3_matters_at_these_lengths():
    """Otherwise the tests above could not tell whether it is computed."""
    scaled, rows = llama("grouped and scaled"), tokens(1, 1, 90)
    plain = transformers.LlamaConfig.from_dict(scaled.config.to_dict() | {"rope_parameters": {"rope_theta": 10000.0}})
    other = transformers.LlamaForCausalLM(plain).eval()
    other.load_state_dict(scaled.state_dict())
    assert distance(theirs(scaled, rows), theirs(other, rows)) > 1e-3


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": False}, {"mlp_only_layers": [0]}])
def test_qwen_models_agree_both_ways(changes, tmp_path):
    model = qwen(**changes)
    model.save_pretrained(tmp_path / "config")
    config = load_model(tmp_path / "config").config
    assert [isinstance(layer, Experts) for layer in config.layers[1::2]].count(True) == (
        1 if "mlp_only_layers" in changes else 2
    )
    check_both_ways(model, tmp_path)
