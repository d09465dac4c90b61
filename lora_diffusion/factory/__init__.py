"""The corpus factory: photos of people in, committed shards of LoRA vectors out. Plain classes; Ray is in `jobs/`."""

from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.embed import EmbeddedPerson, PersonEmbedder
from lora_diffusion.factory.isolate import Attempts, InMemoryAttempts, embed_people, make_group
from lora_diffusion.factory.make import BrokenDeviceError, CommonFault, DeviceError, LoRAMaker
from lora_diffusion.factory.people import PeopleSource, PersonRef, RawPhoto, open_people
from lora_diffusion.factory.shard import ShardMaker, ShardReport

__all__ = [
    "Attempts",
    "BrokenDeviceError",
    "CommonFault",
    "CorpusConfig",
    "DeviceError",
    "EmbeddedPerson",
    "InMemoryAttempts",
    "LoRAMaker",
    "PeopleSource",
    "PersonEmbedder",
    "PersonRef",
    "RawPhoto",
    "ShardMaker",
    "ShardReport",
    "embed_people",
    "make_group",
    "open_people",
]
