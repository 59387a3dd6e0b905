import copy
import dataclasses
import json
import pathlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nautilus.config import Attention, Config, Experts, Linear, Mamba, Mlp, Nothing, Rotary, to_dict, weight_count
from nautilus.config.released import read_config, same, write_config
from nautilus.presets import PRESETS, preset, shrink

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "released"


def released(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def through_text(document: dict) -> dict:
    """As another program would meet it: strict JSON, no Infinity or NaN literals."""
    return json.loads(json.dumps(document, allow_nan=False))


@pytest.mark.parametrize("name", ["nano", "lightning", "super", "ultra", "nemotron_h_56b", "llama_3_1_8b"])
def test_the_released_file_reads_as_the_preset(name):
    read, want = read_config(released(name)), preset(name)
    assert read == dataclasses.replace(want, init_std=0.02, positions=read.positions)


def test_the_positions_are_those_of_the_files():
    positions = {name: read_config(released(name)).positions for name in ("nano", "lightning", "nemotron_h_56b")}
    assert positions == {"nano": 262144, "lightning": 1048576, "nemotron_h_56b": 8192}


def test_the_qwen_file_reads_as_the_preset():
    want = preset("qwen3_30b_a3b")
    read = read_config(released("qwen3_30b_a3b"))
    assert read.layers == want.layers
    assert (read.bos, read.eos, read.norm_eps, read.vocab) == (151643, (151645,), 1e-6, 151936)


@pytest.mark.parametrize(
    "name,main,mtp",
    [
        ("nano", 31_577_940_288, 0),
        ("lightning", 31_577_940_288, 1_335_325_952),
        ("super", 120_668_707_840, 2_942_325_248),
        ("ultra", 549_308_993_536, 11_215_610_368),
    ],
)
def test_parameter_counts_are_the_published_ones(name, main, mtp):
    count = weight_count(read_config(released(name)))
    assert (count["main"], count["mtp"]) == (main, mtp)


def test_blocks_of_a_puzzle_model_have_sizes_of_their_own():
    config = read_config(released("puzzle_four_blocks"))
    mamba, first, attention, second = config.layers
    assert (mamba.state, attention.groups, config.pattern) == (96, 2, "ME*E")
    assert (first.hidden, first.active, first.experts) == (1280, 4, 512)
    assert (second.hidden, second.active, second.experts) == (2688, 18, 384)
    assert (config.mtp[1].hidden, config.mtp[1].active, config.mtp[1].latent) == (2688, 22, 1024)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("small", [False, True])
def test_writing_and_reading_a_preset_changes_nothing(name, small):
    config = shrink(preset(name)) if small else preset(name)
    assert read_config(through_text(write_config(config))) == config


def sizes(*values):
    return st.sampled_from(values)


attentions = st.builds(
    lambda groups, times, head_width, rotary, head_norm, window: Attention(
        heads=groups * times, groups=groups, head_width=head_width, rotary=rotary, head_norm=head_norm, window=window
    ),
    *(sizes(1, 2, 3), sizes(1, 2, 4), sizes(4, 10)),
    st.none() | st.builds(Rotary, theta=st.floats(2, 1e7), factor=sizes(1.0, 8.0), original=sizes(64, 8192)),
    *(st.booleans(), sizes(0, 0, 5)),
)
mambas = st.builds(
    lambda groups, times, head_width, state, taps, chunk: Mamba(
        heads=groups * times, groups=groups, head_width=head_width, state=state, taps=taps, chunk=chunk
    ),
    *(sizes(1, 2), sizes(1, 3), sizes(4, 6), sizes(8, 16), sizes(2, 4), sizes(8, 128)),
)
experts = st.builds(
    Experts,
    experts=sizes(8, 12),
    active=sizes(1, 3),
    hidden=sizes(8, 24),
    shared=sizes(0, 16, 16),
    latent=sizes(0, 0, 12),
    gated=st.booleans(),
    scale=st.floats(0.1, 5),
    score=sizes("sigmoid", "softmax"),
    normalise=st.booleans(),
    expert_groups=sizes(1, 2),
    active_groups=st.just(1),
)
mlps = st.builds(Mlp, hidden=sizes(16, 20), gated=st.booleans())
any_layer = attentions | mambas | experts | mlps | st.builds(Linear) | st.builds(Nothing)


@st.composite
def stacks(draw):
    """Unequal layers, equal layers of a kind in any order, or blocks of an attention and a feed-forward half."""
    shape = draw(sizes("unequal", "equal", "blocks"))
    if shape == "unequal":
        return tuple(draw(st.lists(any_layer, min_size=1, max_size=6)))
    if shape == "equal":
        kinds = [draw(mambas), draw(attentions), draw(experts), draw(mlps)]
        return tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6)))
    return (draw(attentions), draw(mlps | experts)) * draw(sizes(1, 2, 3))


@st.composite
def configs(draw):
    layers = draw(stacks())
    allowed = [layer for layer in layers if isinstance(layer, (Attention, Experts))]
    mtp = draw(st.lists(st.sampled_from(allowed), max_size=2)) if allowed else []
    return Config(
        vocab=draw(st.integers(1, 300)),
        width=draw(sizes(12, 48, 64)),
        layers=layers,
        mtp=tuple(mtp),
        tied=draw(st.booleans()),
        norm_eps=draw(st.floats(1e-8, 1e-2)),
        init_std=draw(st.just(0.0) | st.floats(1e-4, 0.1)),
        positions=draw(st.integers(1, 1 << 21)),
        bos=draw(st.integers(0, 9)),
        eos=tuple(draw(st.lists(st.integers(0, 299), max_size=3))),
        pad=draw(st.integers(0, 9)),
    )


@given(config=configs())
@settings(max_examples=100, deadline=None)
def test_writing_and_reading_any_config_changes_nothing(config):
    assert same(read_config(through_text(write_config(config))), config)


@given(mamba=mambas, attention=attentions, expert=experts, mlp=mlps)
@settings(max_examples=50, deadline=None)
def test_equal_plain_layers_are_written_as_nemotron_h(mamba, attention, expert, mlp):
    plain = (
        mamba,
        dataclasses.replace(attention, rotary=None, head_norm=False, window=0),
        dataclasses.replace(expert, gated=False, score="sigmoid", shared=16),
        dataclasses.replace(mlp, gated=False),
    )
    assert write_config(Config(vocab=9, width=24, layers=plain * 2, mtp=plain[1:3]))["model_type"] == "nemotron_h"


def test_each_kind_of_model_finds_its_family():
    toy = preset("toy")
    wider = dataclasses.replace(toy.layers[1], hidden=256)
    found = {
        "equal": write_config(toy),
        "unequal": write_config(dataclasses.replace(toy, layers=(*toy.layers, wider))),
        "pairs": write_config(shrink(preset("llama_3_1_8b"))),
        "pairs of experts": write_config(shrink(preset("qwen3_30b_a3b"))),
        "linear": write_config(dataclasses.replace(toy, layers=(*toy.layers, Linear()))),
        "no shared expert": write_config(
            dataclasses.replace(toy, mtp=(), layers=(toy.layers[0], dataclasses.replace(wider, shared=0)))
        ),
    }
    assert {name: document["model_type"] for name, document in found.items()} == {
        "equal": "nemotron_h",
        "unequal": "nemotron_h_puzzle",
        "pairs": "llama",
        "pairs of experts": "qwen3_moe",
        "linear": "nautilus",
        "no shared expert": "nautilus",
    }


def test_unequal_blocks_name_width_and_top_k_each():
    toy = preset("toy")
    layers = (*toy.layers, dataclasses.replace(toy.layers[1], active=2))
    blocks = write_config(dataclasses.replace(toy, layers=layers))["block_configs"]
    assert [(b["moe_intermediate_size"], b["num_experts_per_tok"]) for b in blocks if b["block_type"] == "moe"] == [
        (128, 4),
        (128, 4),
        (128, 4),
        (128, 2),
    ]


EQUIVALENT = {
    "words of transformers": {
        "hybrid_override_pattern": None,
        "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention", "moe", "mlp"],
    },
    "layer_types": {
        "hybrid_override_pattern": None,
        "layer_types": ["mamba", "moe", "mamba", "attention", "moe", "mlp"],
    },
    "a list beats the string": {
        "hybrid_override_pattern": "MMMM",
        "layers_block_type": ["mamba", "moe", "mamba", "attention", "moe", "mlp"],
    },
    "depth is the length of the list": {"num_hidden_layers": 77},
    "infinity of transformers 5": {"time_step_limit": [0.0, {"__float__": "Infinity"}]},
    "infinity as a literal": {"time_step_limit": [0.0, float("inf")]},
    "not a number in a key that is not read": {"time_step_floor": float("nan")},
    "old names": {
        "n_groups": None,
        "mamba_n_groups": 2,
        "conv_kernel": None,
        "mamba_d_conv": 4,
        "chunk_size": None,
        "mamba_chunk_size": 64,
        "use_conv_bias": None,
        "mamba_conv_bias": True,
        "head_dim": None,
        "attention_head_dim": 64,
        "layer_norm_epsilon": None,
        "rms_norm_eps": 1e-5,
        "n_routed_experts": None,
        "num_local_experts": 16,
        "mamba_expand": 2,
        "time_step_min": None,
        "mamba_dt_min": 0.001,
        "mamba_dt_max": 0.1,
        "time_step_limit": None,
        "mamba_dt_limit": [0.0, 1e308],
        "mamba_dt_init_floor": 1e-4,
        "torch_dtype": "bfloat16",
    },
    "two equal names": {"norm_eps": 1e-5},
    "expand never sets a width": {"expand": 17},
    "rotary keys are carried along": {"rope_theta": 10000, "partial_rotary_factor": 0.5},
    "quantisation is the loader's matter": {"quantization_config": {"quant_method": "modelopt"}},
    "mtp as a list": {"mtp_hybrid_override_pattern": None, "mtp_layers_block_type": ["full_attention", "moe"]},
    "mtp by default": {"mtp_hybrid_override_pattern": None},
}


def six_layers() -> tuple[Config, dict]:
    toy = preset("toy")
    mamba, experts_, attention = toy.layers[0], toy.layers[1], toy.layers[3]
    layers = (mamba, experts_, mamba, attention, experts_, Mlp(hidden=96))
    config = dataclasses.replace(toy, layers=layers)
    return config, write_config(config)


@pytest.mark.parametrize("name", EQUIVALENT)
def test_other_spellings_read_the_same(name):
    config, document = six_layers()
    assert read_config(document | EQUIVALENT[name]) == config


def test_sizes_per_layer_in_the_spelling_of_transformers():
    config, document = six_layers()
    read = read_config(document | {"per_layer_config": {"04": {"moe_intermediate_size": 40, "num_local_experts": 16}}})
    assert read.layers[4].hidden == 40
    assert read.layers[:4] == config.layers[:4]


def test_a_model_without_experts_ignores_the_expert_keys():
    config, document = six_layers()
    config = dataclasses.replace(config, layers=(config.layers[0], config.layers[3], config.layers[5]), mtp=())
    document |= {"hybrid_override_pattern": "M*-", "n_routed_experts": None, "num_nextn_predict_layers": 0}
    assert read_config(document) == config


REFUSED = {
    "a misspelt key": ({"hiden_size": 3}, "hiden_size.*did you mean 'hidden_size'"),
    "a key nobody knows": ({"logit_softcap": 30.0}, "logit_softcap"),
    "attention bias": ({"attention_bias": True}, "attention_bias=True"),
    "projection bias": ({"use_bias": True}, "use_bias=True"),
    "no bias in the convolution": ({"use_conv_bias": False}, "use_conv_bias=False"),
    "another activation": ({"mlp_hidden_act": "silu"}, "mlp_hidden_act='silu'"),
    "a window": ({"sliding_window": 4096}, "sliding_window=4096"),
    "dropout": ({"hidden_dropout": 0.1}, "hidden_dropout=0.1"),
    "two shared experts": ({"n_shared_experts": 2}, "n_shared_experts=2"),
    "a clamp": ({"time_step_limit": [0.001, 0.1]}, "time_step_limit"),
    "two values for one setting": ({"norm_eps": 1e-6}, "layer_norm_epsilon=1e-05 and norm_eps=1e-06"),
    "several MTP blocks": ({"num_nextn_predict_layers": 3}, "num_nextn_predict_layers=3"),
    "an unknown letter": ({"hybrid_override_pattern": "MEX"}, "'X' as layer 2"),
    "an unknown word": ({"layers_block_type": ["mamba", "conv"]}, "'conv' as layer 1"),
    "no layers": ({"hybrid_override_pattern": None}, "layers_block_type.*hybrid_override_pattern"),
    "a missing size": ({"hidden_size": None}, "no 'hidden_size'"),
    "missing experts": ({"n_routed_experts": None}, "no 'n_routed_experts'"),
    "text for a number": ({"hidden_size": "256"}, "hidden_size='256'"),
    "a fraction for a whole number": ({"vocab_size": 40.5}, "vocab_size=40.5"),
    "infinity for a scale": ({"routed_scaling_factor": {"__float__": "Infinity"}}, "routed_scaling_factor=inf"),
    "a number for a switch": ({"norm_topk_prob": 1}, "norm_topk_prob=1"),
    "text as end of sequence": ({"eos_token_id": ["x"]}, "eos_token_id"),
    "more active experts than experts": ({"num_experts_per_tok": 99}, "experts.active=99"),
    "an unknown size of a layer": ({"per_layer_config": {"1": {"skip": ["mlp"]}}}, "layer 1.*skip"),
    "a layer that is not there": ({"per_layer_config": {"6": {}}}, r"for layers 6; it has layers 0\.\.5"),
    "an unknown family": ({"model_type": "nemotron_hh"}, "nemotron_hh.*did you mean 'nemotron_h'"),
    "no family": ({"model_type": None}, "model_type='None'"),
    "our own form without content": ({"model_type": "nautilus"}, "no settings under 'nautilus'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        read_config(six_layers()[1] | changes)


def llama(**changes) -> dict:
    return released("llama_3_1_8b") | changes


def test_rotary_settings_of_transformers_5_read_as_those_of_4():
    document = llama(rope_scaling=None, rope_theta=None)
    document["rope_parameters"] = released("llama_3_1_8b")["rope_scaling"] | {"rope_theta": 500000.0}
    assert read_config(document) == read_config(llama())


def test_llama_fills_in_what_follows_from_other_sizes():
    config = read_config(llama(head_dim=None, num_key_value_heads=None, rope_scaling=None, tie_word_embeddings=True))
    attention = config.layers[0]
    assert (attention.head_width, attention.groups, config.tied) == (128, 32, True)
    assert attention.rotary == Rotary(theta=500000.0)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "no 'low_freq_factor'"),
        ({"rope_scalling": None}, "did you mean 'rope_scaling'"),
    ],
)
def test_llama_files_that_ask_for_something_else_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read_config(llama(**changes))


def test_dense_layers_among_qwen_experts_are_read_and_written():
    config = read_config(released("qwen3_30b_a3b") | {"decoder_sparse_step": 2, "mlp_only_layers": [1]})
    assert config.pattern[:8] == "*-*-*-*E"
    assert read_config(through_text(write_config(config))) == config


def test_reading_leaves_the_document_as_it_was():
    for path in GOLDEN.glob("*.json"):
        document = json.loads(path.read_text())
        before = copy.deepcopy(document)
        read_config(document)
        assert document == before


JUNK = st.sampled_from(
    [None, "x", "", "x" * 5000, -1, 0, 1.5, True, 10**400, 2**63, 1e308, float("inf"), float("nan")]
    + [[], {}, [1], ["x"], [[]], [{}], [10**400], {"x": 1}, {"x": "y"}, {"__float__": "x"}, {"__float__": [1]}]
)
OWN_FORMS = [{"model_type": "nautilus", "nautilus": to_dict(preset(name))} for name in ("nano", "gpt_oss_20b")]
DOCUMENTS = [*OWN_FORMS, *(json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*.json")))]


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_junk_under_any_key_gives_a_config_or_a_short_value_error(data):
    document = copy.deepcopy(data.draw(st.sampled_from(DOCUMENTS)))
    inner = document.get("nautilus", document)
    inner = data.draw(st.sampled_from([inner, *inner.get("layers", [])[:2]]))
    more = ["per_layer_config", "rope_parameters", "mlp_only_layers"]
    inner[data.draw(st.sampled_from([*sorted(inner), *more]))] = data.draw(JUNK)
    try:
        config = read_config(document)
        assert isinstance(config, Config) and weight_count(config)["main"] < 1e300
    except ValueError as told:
        assert 0 < len(str(told)) < 2000


@pytest.mark.parametrize(
    "name,changes",
    [
        ("lightning", {"hybrid_override_pattern": "M" * 3_000_000, "layers_block_type": None}),
        ("lightning", {"hybrid_override_pattern": None, "layers_block_type": ["moe"] * 3_000_000}),
        ("lightning", {"mtp_hybrid_override_pattern": "*E" * 1_500_000, "mtp_layers_block_type": None}),
        ("llama_3_1_8b", {"num_hidden_layers": 10**12}),
        ("qwen3_30b_a3b", {"num_hidden_layers": 10**12}),
    ],
)
def test_layers_beyond_number_are_refused_at_once(name, changes):
    document = released(name)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="at most 10,000") as caught:
        read_config(document | changes)
    assert time.monotonic() - begin < 3 and len(str(caught.value)) < 500
