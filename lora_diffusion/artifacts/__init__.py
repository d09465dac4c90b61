"""What is written beside weights: which model they belong to, where they come from, and the state of a training."""
