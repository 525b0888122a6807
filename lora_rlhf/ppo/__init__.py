"""PPO on the shared base: rollouts, token rewards, advantages, losses, and the loop."""
