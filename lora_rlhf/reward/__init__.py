"""Rewards: the LoRA reward adapter trained on preferences, and the sources that PPO adds up."""
