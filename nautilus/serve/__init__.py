"""Requests in; text, tokens and log-probs out."""

from nautilus.serve.control import opens_thinking
from nautilus.serve.engine import Engine
from nautilus.serve.request import Completion, Piece
from nautilus.serve.sampling import Sampling
from nautilus.serve.toolcalls import Answer, AnswerStream, split_answer

__all__ = ["Answer", "AnswerStream", "Completion", "Engine", "Piece", "Sampling", "opens_thinking", "split_answer"]
