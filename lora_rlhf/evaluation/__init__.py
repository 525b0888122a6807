"""Evaluation: base, Instruct and Plus compared on held-out prompts."""
