import pytest
import torch

from nautilus.ops import precision
from nautilus.ops.precision import compute_dtype


def test_named_types_are_taken_and_others_refused():
    assert compute_dtype("bf16") == torch.bfloat16 and compute_dtype("fp32") == torch.float32
    with pytest.raises(ValueError, match=r"compute='fp16' is unknown; choose auto, bf16 or fp32"):
        compute_dtype("fp16")


@pytest.mark.parametrize("features,want", [({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16),
                                           ({"avx512_bf16": False, "avx2": True}, torch.float32)])  # fmt: skip
def test_auto_is_bf16_only_where_the_cpu_multiplies_it(features, want, monkeypatch):
    monkeypatch.setattr(precision.torch.cpu, "get_capabilities", lambda: features)
    assert compute_dtype("auto") == want
