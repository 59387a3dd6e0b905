"""Functions on tensors. Each has a slow, obvious reference and may have fast twins with the same signature."""
