"""One loop, and what a stage brings to it: a stream and an objective."""
