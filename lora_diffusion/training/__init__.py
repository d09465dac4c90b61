"""Training of any network: the rate, the loop, its checkpoints, the workers. Knows nothing of LoRAs."""
