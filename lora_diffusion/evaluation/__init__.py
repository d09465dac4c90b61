"""How good a synthesiser is: every method's LoRAs for held-out people, drawn and scored on one path.

Start reading at `scoring.py`; `jobs/evaluate.py` and `jobs/ablate.py` put it on Ray. The figures of single people that the
factory and the benchmarks need are in `lora_diffusion/evaluation/similarity.py`.
"""

from lora_diffusion.evaluation.config import EvaluationConfig
from lora_diffusion.evaluation.held_out import HeldOut, PhotoEmbedder
from lora_diffusion.evaluation.methods import Method
from lora_diffusion.evaluation.scoring import Scorer, Scores

__all__ = ["EvaluationConfig", "HeldOut", "Method", "PhotoEmbedder", "Scorer", "Scores"]
