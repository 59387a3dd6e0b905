"""Which dtype to compute in on which device."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# CPUs that multiply bf16 faster than float32: AVX-512 BF16 or AMX on x86, the BF16 extension on ARM.
BF16_FEATURES = ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16")


def compute_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """bf16, fp32, or auto: bf16 where the device multiplies it faster. ValueError for any other word."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bf16(device) else torch.float32
    if name not in DTYPES:
        raise ValueError(f"compute={name!r} is unknown; choose auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


def multiplies_bf16(device: str) -> bool:
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    found = torch.cpu.get_capabilities()
    return any(found.get(feature, False) for feature in BF16_FEATURES)
