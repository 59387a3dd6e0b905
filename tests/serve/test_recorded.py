"""What cannot be replayed is computed once a step all the same: states that it changes are changed once."""

import pytest
import torch

from nautilus.ops.cpu.library import native
from nautilus.serve import Engine, Sampling
from tests.posttrain.small import TOKENIZER, counted, counter

torch.set_num_threads(1)
NATIVE = pytest.mark.skipif(native().functions is None, reason="nothing is recorded")


@NATIVE
@pytest.mark.parametrize("drafts", [0, 6])
def test_a_model_of_which_pytorch_computes_a_part(drafts):
    model = counter()
    for layer in model.modules():
        if hasattr(layer, "gate") and hasattr(layer.gate, "weight"):  # routers in bf16 are computed by PyTorch
            layer.gate.bfloat16()
    engine = Engine(model, TOKENIZER, max_tokens=100, rows=1, drafts=drafts)
    prompt = counted(3, 2, 9)
    answer = [*engine.generate([prompt], Sampling(temperature=0, max_tokens=30))[0].tokens]
    assert engine.forward.steps[1].recorded.tape is None and not engine.forward.steps[1].recorded.may_record
    for at in range(len(answer)):
        logits_BTV, _ = model(torch.tensor([prompt + answer[:at]]))
        assert int(logits_BTV[0, -1].argmax()) == answer[at], at
