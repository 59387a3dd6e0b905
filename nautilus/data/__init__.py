"""Anything → Batch. Text sources, the tokenizer, the chat template, packing, token shards on disk, resumable mixing."""
