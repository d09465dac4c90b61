"""What is written beside weights: which model they belong to, and where they come from."""
