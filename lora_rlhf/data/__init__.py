"""Preference pairs and prompts: reading them, turning them into token ids, and the embedded default set."""
