"""Several tokens for one pass of the model: drafts, what they cost, how many are worth trying."""
