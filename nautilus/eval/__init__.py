"""What a model is worth: held-out loss, expert loads, and the report of a run."""
