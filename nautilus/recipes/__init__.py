"""Thin stories in pipeline order, each under 100 lines: what lies below does the work."""
