import dataclasses

import pytest
import torch

from nautilus.eval.loads import expert_loads
from nautilus.model.language import Language
from nautilus.ops.experts import route
from nautilus.presets import preset, shrink

torch.set_num_threads(1)


@pytest.fixture
def model():
    return Language(shrink(preset("super")), dtype=torch.float64).initialise(seed=2)


def documents(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=draw).tolist() for length in (23, 5, 41)]


def test_the_loads_are_those_of_each_document_alone(model):
    counts = {}

    def count(name, layer):
        def hook(router, inputs, logits):
            chosen, _, _ = route(logits, router.bias, layer.active)
            counts[name] = counts.get(name, 0) + torch.bincount(chosen.flatten(), minlength=layer.experts)

        return hook

    for index, layer in enumerate(model.config.layers):
        if layer.letter == "E":
            model.backbone.layers[index].mixer.gate.register_forward_hook(count(str(index), layer))
    for document in documents():
        model.hidden(torch.tensor([document]))
    want = {name: (count / count.double().mean()).tolist() for name, count in counts.items()}
    counts.clear()
    got = expert_loads(model, documents(), chunk=16)
    assert got.keys() == want.keys() and len(got) == model.config.pattern.count("E")
    for name, loads in got.items():
        assert loads == pytest.approx(want[name], rel=1e-6)
        assert sum(loads) == pytest.approx(len(loads))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_its_running_counts_are_left_as_they_were(model, training):
    model.train(training)
    for mixer in model.experts_mixers().values():
        mixer.load_E.fill_(7)
    expert_loads(model, documents())
    assert model.training is training
    assert all((mixer.load_E == 7).all() for mixer in model.experts_mixers().values())


def test_an_expert_that_is_never_chosen_has_load_zero(model):
    first = next(iter(model.experts_mixers().values()))
    first.gate.bias[3] = -100.0
    assert next(iter(expert_loads(model, documents()).values()))[3] == 0


def test_a_model_without_experts_has_no_loads():
    config = shrink(preset("super"))
    config = dataclasses.replace(config, layers=tuple(layer for layer in config.layers if layer.letter != "E"), mtp=())
    assert expert_loads(Language(config, dtype=torch.float64).initialise(seed=1), documents()) == {}
