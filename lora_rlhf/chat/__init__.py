"""Talking to base, Instruct and Plus at once: what the demo and its API stand on."""
