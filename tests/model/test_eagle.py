"""The draft head: its sizes, its arithmetic in memory of an engine, its folder."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nautilus.config import Attention, Config, Experts, Mamba, lay
from nautilus.model.eagle import FILE, SIZES, Eagle, load_eagle, sizes_for, taps_of, trunk_fingerprint
from nautilus.model.lanes import Lanes
from nautilus.model.language import Language
from nautilus.model.state import place
from nautilus.ops.pages import Rows, new_pool
from nautilus.presets import preset
from nautilus.runtime import UserError

torch.set_num_threads(1)
WORDS = torch.tensor([1, 4, 5, 9, 20, 21, 22, 40])


def model_of(pattern="ME*M", seed=1, **more):
    mamba, attention = Mamba(heads=2, head_width=16, state=8, groups=1), Attention(heads=4, groups=2, head_width=16)
    layers = lay(pattern, mamba, attention, Experts(experts=4, active=2, hidden=24))
    return Language(Config(vocab=50, width=32, layers=layers, **more)).initialise(seed).requires_grad_(False).eval()


MODEL = model_of()


def head_of(model=MODEL, **sizes):
    return Eagle(model.config, sizes_for(model.config, len(WORDS), **sizes), WORDS).initialise(model, 3).eval()


@pytest.fixture
def saved(tmp_path):
    head_of().save(tmp_path / "head", MODEL)
    return tmp_path / "head"


def test_taps_are_those_of_the_paper_and_stay_inside_a_small_model():
    assert taps_of(52) == (2, 26, 49) and taps_of(7) == (2, 3, 4)
    assert taps_of(4) == (2, 2, 1) and taps_of(1) == (0, 0, 0)


@pytest.mark.parametrize("name", ["nano", "super", "llama_3_1_8b", "toy_1m"])
def test_every_model_has_sizes(name):
    config = preset(name)
    sizes = sizes_for(config, 100)
    own = next(layer for layer in config.layers if isinstance(layer, Attention))
    assert (sizes.heads, sizes.groups, sizes.head_width) == (own.heads, own.groups, own.head_width)
    assert sizes.hidden % 16 == 0 and 8 * config.width <= 3 * sizes.hidden < 8 * config.width + 48
    with torch.device("meta"):
        Eagle(config, sizes, torch.empty(100, dtype=torch.int64))
    assert sizes_for(dataclasses.replace(config, layers=lay("M", Mamba(heads=8))), 100).heads >= 1


@pytest.mark.parametrize("gated", [True, False])
def test_the_head_is_its_formula(gated):
    head, generator = head_of(gated=gated), torch.Generator().manual_seed(1)
    residuals = [torch.randn(1, 6, 32, generator=generator) for _ in range(3)]
    ahead = torch.randn(1, 6, 32, generator=generator)
    norm = lambda module, x: x * (x.square().mean(-1, keepdim=True) + module.eps).rsqrt() * module.weight
    h = torch.cat(residuals, -1) @ head.fc.weight.T
    f = torch.cat([norm(head.enorm, ahead), norm(head.hnorm, h)], -1) @ head.eh_proj.weight.T
    attention, mlp = (layer.mixer for layer in head.layers)
    u = norm(head.layers[0].norm, f)
    q, k, v = ((u @ p.weight.T).unflatten(-1, (-1, 16)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
    score = torch.einsum("bthp,bshp->bhts", q, k) / 4 + torch.full((6, 6), float("-inf")).triu(1)
    f = f + torch.einsum("bhts,bshp->bthp", score.softmax(-1), v).flatten(-2) @ attention.o_proj.weight.T
    u = norm(head.layers[1].norm, f)
    up = u @ mlp.up_proj.weight.T
    inner = torch.nn.functional.silu(u @ mlp.gate_proj.weight.T) * up if gated else up.relu().square()
    f = f + inner @ mlp.down_proj.weight.T
    found = head(head.features(residuals), ahead, place(None, None, 1, 6, "cpu"))
    torch.testing.assert_close(found, f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.head(found), norm(head.norm_f, f) @ head.lm_head.weight.T, rtol=1e-4, atol=1e-5)
    assert head.head(found).shape == (1, 6, len(WORDS)) and head.head(found).dtype == torch.float32


def test_in_the_memory_of_an_engine_it_computes_the_same():
    """Some tokens first, then one by one, two rows at once."""
    head, generator = head_of(), torch.Generator().manual_seed(5)
    hidden, ahead = torch.randn(2, 2, 23, 32, generator=generator)
    whole = head(hidden, ahead, place(None, None, 2, 23, "cpu"))
    pool = new_pool(4, head.sizes.groups, head.sizes.head_width, "f32")
    table_BL, found = torch.tensor([[0, 2], [3, 1]], dtype=torch.int32), []
    for begin, end in [(0, 15), *((at, at + 1) for at in range(15, 23))]:
        size = end - begin
        begins = torch.tensor([0, size, 2 * size], dtype=torch.int32)
        rows = Rows(begin=begins, length=torch.full((2,), end, dtype=torch.int32), table_BL=table_BL)
        lanes = Lanes(layers=(pool,), slot_B=torch.tensor([0, 1], dtype=torch.int32), rows=rows)
        span = place(lanes, None, 1, 2 * size, "cpu")
        one, two = (part[:, begin:end].reshape(1, 2 * size, -1) for part in (hidden, ahead))
        found.append(head(one, two, span, (pool,)).view(2, size, -1))
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-5)


def test_it_begins_with_the_rows_of_the_models_own_head():
    head = head_of()
    assert torch.equal(head.lm_head.weight, MODEL.head_weight[WORDS])
    assert torch.equal(head.norm_f.weight, MODEL.backbone.norm_f.weight)
    again = head_of().state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in head.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_holds_all_of_it(tmp_path, dtype):
    head = Eagle(MODEL.config, sizes_for(MODEL.config, len(WORDS), gated=False), WORDS, dtype=dtype).initialise(
        MODEL, 3
    )
    head.save(tmp_path / "run" / "model", MODEL)
    for place_ in (tmp_path / "run", tmp_path / "run" / "model"):
        found = load_eagle(place_, MODEL)
        assert found.sizes == head.sizes and found.taps == head.taps and not found.training
        for name, tensor in found.state_dict().items():
            assert torch.equal(tensor, head.state_dict()[name]) and tensor.dtype == head.state_dict()[name].dtype
        assert not any(weight.requires_grad for weight in found.parameters())


def test_a_head_goes_with_its_model_whatever_becomes_of_the_prediction_block(saved):
    boosted = model_of(mtp=lay("*", Attention(heads=4, groups=2, head_width=16)))
    boosted.backbone.load_state_dict(MODEL.backbone.state_dict())
    assert trunk_fingerprint(boosted) == trunk_fingerprint(MODEL)
    load_eagle(saved, boosted)
    for other in (model_of(seed=2), model_of("M*EM")):
        with pytest.raises(UserError, match="made for another model"):
            load_eagle(saved, other)


def edited(saved, **changes):
    document = json.loads((saved / SIZES).read_text())
    for name, value in changes.items():
        if name in document["sizes"]:
            document["sizes"][name] = value
        else:
            document[name] = value
    (saved / SIZES).write_text(json.dumps(document))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden": 48}, "does not hold the head of its"),
        ({"words": 7}, "does not hold the head of its"),
        ({"words": 10**15}, "does not hold the head of its"),
        ({"heads": 3}, "describes no draft head"),
        ({"heads": "many"}, "describes no draft head"),
        ({"words": 0}, "describes no draft head"),
        ({"sizes": None}, "describes no draft head"),
        ({"sizes": {"words": 8, "strange": 1}}, "describes no draft head"),
        ({"dtype": "int8"}, "describes no draft head"),
        ({"nautilus_eagle": 2}, "describes no draft head"),
        ({"fingerprint": "x"}, "made for another model"),
    ],
)
def test_other_sizes_are_refused(saved, changes, message):
    edited(saved, **changes)
    with pytest.raises(UserError, match=message):
        load_eagle(saved, MODEL)


def test_damaged_files_are_refused(saved, tmp_path):
    tensors = load_file(saved / FILE)
    for name, broken in {
        "nan": tensors | {"fc.weight": tensors["fc.weight"] * float("nan")},
        "missing": {name: t for name, t in tensors.items() if name != "eh_proj.weight"},
        "more": tensors | {"another": torch.zeros(2)},
        "kind": tensors | {"token_ids_K": tensors["token_ids_K"].float()},
    }.items():
        save_file(broken, saved / FILE)
        with pytest.raises(UserError, match="does not hold the head of its"):
            load_eagle(saved, MODEL)
        assert name
    for ids in (WORDS.flip(0), WORDS + 10, WORDS - 2):
        save_file(tensors | {"token_ids_K": ids.contiguous()}, saved / FILE)
        with pytest.raises(UserError, match=r"rising, in 0\.\.49"):
            load_eagle(saved, MODEL)
    (saved / FILE).write_bytes((saved / FILE).read_bytes()[:500])
    with pytest.raises(UserError, match="no complete safetensors file"):
        load_eagle(saved, MODEL)
    (saved / FILE).unlink()
    with pytest.raises(UserError, match="has no eagle.safetensors"):
        load_eagle(saved, MODEL)
    shutil.rmtree(saved)
    with pytest.raises(UserError, match="nautilus eagle"):
        load_eagle(saved, MODEL)
