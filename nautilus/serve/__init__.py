"""Requests in; text, tokens and log-probs out."""

from nautilus.serve.control import Answer, Thinking, opens_thinking, split_answer
from nautilus.serve.engine import Engine
from nautilus.serve.request import Completion, Piece
from nautilus.serve.sample import Sampling

__all__ = ["Answer", "Completion", "Engine", "Piece", "Sampling", "Thinking", "opens_thinking", "split_answer"]
