"""The chat page: base, Instruct and Plus side by side."""
