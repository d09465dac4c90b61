"""The corpus factory: photos of people in, committed shards of LoRA vectors out. Plain classes; Ray is in `jobs/`."""
