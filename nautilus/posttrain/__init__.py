"""Training after pretraining, on what the model itself writes."""
