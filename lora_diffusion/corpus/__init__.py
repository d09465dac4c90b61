"""A corpus of LoRA vectors: Parquet shards with one row for each person. Format: docs/reference/formats.md."""

from lora_diffusion.corpus.manifest import Manifest
from lora_diffusion.corpus.plan import CorpusError, Plan, ShardPlan
from lora_diffusion.corpus.reader import CorpusReader, ShardInfo
from lora_diffusion.corpus.schema import Failure, Person, matrix, person_schema
from lora_diffusion.corpus.statistics import Statistics
from lora_diffusion.corpus.writer import CorpusConflict, ShardWriter, count, extend_plan, finish_corpus, open_corpus

__all__ = [
    "CorpusConflict",
    "CorpusError",
    "CorpusReader",
    "Failure",
    "Manifest",
    "Person",
    "Plan",
    "ShardInfo",
    "ShardPlan",
    "ShardWriter",
    "Statistics",
    "count",
    "extend_plan",
    "finish_corpus",
    "matrix",
    "open_corpus",
    "person_schema",
]
