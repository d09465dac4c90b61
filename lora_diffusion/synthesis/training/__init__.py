"""Training of a synthesiser: data, stages, the loop, its state. `jobs/train.py` puts it on Ray Train."""
