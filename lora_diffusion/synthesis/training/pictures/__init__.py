"""The third stage of training: the synthesiser learns from the pictures that its LoRAs draw."""
