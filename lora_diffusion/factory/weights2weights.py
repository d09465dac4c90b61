"""The corpus that weights2weights published (arXiv:2406.09413) -> a corpus of ours, shard by shard.

Their `all_weights.pt` is one matrix (M, N) in our order. Rows that they keep as PCA coefficients are `(p Vᵀ) std + mean`. No
pickle is loaded: torch reads tensors alone (`weights_only`), and a file is mapped only while its rows are copied.

Axes: M rows of their file, P rows of a shard, N vector length, K principal components, E embedding (512).
"""

from __future__ import annotations

import csv
import hashlib
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from lora_diffusion.config import load_config
from lora_diffusion.corpus import CorpusReader, Failure, Manifest, Person, ShardPlan, ShardWriter
from lora_diffusion.corpus.schema import EMBEDDING_SIZE
from lora_diffusion.faces.embedder import EmbedderConfig, FaceEmbedder, folder_fingerprint
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.embed import EmbeddedPerson
from lora_diffusion.factory.people import PersonRef
from lora_diffusion.factory.planning import Listed, as_begun, list_people
from lora_diffusion.factory.shard import ShardReport
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.lora.weights2weights import W2W_ALPHA
from lora_diffusion.models.known_unets import meta_unet
from lora_diffusion.places import Output, People, Place, PlaceOrName, local_place
from lora_diffusion.storage import open_store

NAN = float("nan")
BLOCK = 8192  # columns of V at a time


@dataclass(frozen=True)
class ImportConfig:
    """The whole of `jobs/import_weights2weights.py`.

    weights: .pt or .npy, one matrix (people, 99,648); or, with `pca`, their coefficients (people, components).
        As all files here, on a disk that all workers see.
    identities: a name for each row: CSV or Parquet (column `identity`, or the first one), or a text file with a name a line.
        None: row-0000000 and so on.
    embeddings: .pt or .npy (people, 512), in the order of the rows. None: of `photos`.
    photos: of the same people, by the same names (see docs/guides/photos.md); `embedder` embeds them.
    pca: the folder of their mean.pt, std.pt and V.pt.
    recogniser: what made `embeddings`, as the corpus will call it.
    base: the model that the LoRAs are for, as the corpus will call it. It is not loaded.
    """

    weights: Place
    output: Output  # folder or s3:// of the corpus
    identities: Place | None = None
    embeddings: Place | None = None
    photos: People | None = None
    pca: Place | None = None
    base: PlaceOrName = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    recogniser: PlaceOrName = "buffalo_l"
    embedder: EmbedderConfig = field(default_factory=lambda: EmbedderConfig(model="buffalo_l"))
    min_photos: int = 1  # people with fewer usable photos fail
    max_photos: int = 20  # the first so many are embedded
    limit: int | None = None  # only the first so many rows
    people_per_shard: int = 64  # rows of one file of the corpus
    workers: int = 0  # processes that copy rows; 0: one for each CPU, at most 8
    cpus: float = 0.5  # of each

    def __post_init__(self) -> None:
        for key in ("weights", "identities", "embeddings", "pca"):
            if value := getattr(self, key):
                local_place(value, f"the file of {key}")
        if (self.embeddings is None) == (self.photos is None):
            raise ValueError(
                "a synthesiser learns from an embedding of each person: give embeddings=FILE with a row of 512 numbers for each "
                "row of weights, or photos=FOLDER of the same people"
            )

    @property
    def corpus(self) -> CorpusConfig:
        """As if the corpus job had made it: configs/sd15.yaml holds the recipe of weights2weights."""
        config = load_config(CorpusConfig, "configs/sd15.yaml")
        config = replace(
            config,
            people=self.photos or self.weights,
            output=self.output,
            base=self.base,
            embedder=self.embedder if self.photos else replace(config.embedder, model=self.recogniser),
            photos=replace(config.photos, min_photos=self.min_photos, max_photos=self.max_photos),
            people_per_group=self.people_per_shard,
            groups_per_shard=1,
        )
        return as_begun(config)


def layout() -> LoRALayout:
    """N = 99,648: rank 1 on `to_q` and `to_v` of Stable Diffusion 1.5, alpha 27."""
    return LoRALayout.from_unet(meta_unet("sd1"), 1, ("to_q", "to_v"), W2W_ALPHA)


def mapped(place: str) -> torch.Tensor:
    """The matrix of a .pt or .npy file, mapped: nothing of it is read yet. Raises ValueError for any other file."""
    path = local_place(place, "a file of rows")
    found: object
    try:
        if path.suffix == ".npy":
            found = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
        else:
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, TypeError) as error:
        raise ValueError(
            f"{path} is no file of one tensor, written by torch.save of torch 1.6 or later, or of numpy ({_first(error)}). A pickle "
            "is not opened: load it where you trust it, and write its tensor alone with torch.save"
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or found.ndim not in (1, 2):
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise ValueError(f"{path} holds {what}, expected one matrix of floating point numbers, a row for each person")
    return found[None] if found.ndim == 1 else found


def read_rows(place: str, rows: Sequence[int] | slice = slice(None), columns: int | None = None) -> np.ndarray:
    """(rows, columns) float32, copied. The file is mapped for this moment only, so that a process never seems to hold what it has read."""
    some = mapped(place)[rows if isinstance(rows, slice) else torch.tensor(list(rows), dtype=torch.long)]
    return some[:, :columns].to(torch.float32, copy=True).numpy()


def shape_of(place: str) -> tuple[int, int]:
    """(rows, columns)."""
    rows, columns = mapped(place).shape
    return rows, columns


def read_names(place: str) -> list[str]:
    """The names of a table or text file, one a row. Raises ValueError for a file that is neither."""
    path = local_place(place, "identities")
    try:
        if path.suffix == ".txt":
            return path.read_text(encoding="utf-8").splitlines()
        if path.suffix != ".parquet":
            return _names_of_csv(path)
        table = pa.parquet.read_table(path)
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"identities: {path} is no CSV, Parquet or text file ({_first(error)}). Their identity_df.pt is a pickle: "
            "pandas.read_pickle(...).to_csv(...) where you trust it"
        ) from error
    index = table.column_names.index("identity") if "identity" in table.column_names else 0
    return [str(value) for value in table.column(index).to_pylist()]


def _names_of_csv(path: Path) -> list[str]:
    """As they are written: 0012 is no number."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    if not rows:
        raise csv.Error("it is empty")
    index = rows[0].index("identity") if "identity" in rows[0] else 0
    if short := [number for number, row in enumerate(rows, 1) if len(row) <= index]:
        raise csv.Error(f"row {short[0]} has no column {index + 1}")
    return [row[index] for row in rows[1:]]


class Source:
    """What the files hold, checked against each other. Raises ValueError if they do not fit."""

    def __init__(self, config: ImportConfig) -> None:
        self.config, self.layout = config, layout()
        self.count, width = shape_of(config.weights)
        if config.pca is not None:
            self._check_pca(width)
        elif width != self.layout.size:
            raise ValueError(
                f"{config.weights} has rows of {width:,} numbers; a LoRA of weights2weights has {self.layout.size:,}. Coefficients of "
                "their PCA need pca=FOLDER, with mean.pt, std.pt and V.pt"
            )
        if config.embeddings is not None and (found := shape_of(config.embeddings)) != (self.count, EMBEDDING_SIZE):
            raise ValueError(f"{config.embeddings} is {found}, expected ({self.count}, {EMBEDDING_SIZE}): a row each")
        names = read_names(config.identities) if config.identities else [f"row-{i:07d}" for i in range(self.count)]
        if len(names) != self.count:
            raise ValueError(f"{config.identities} has {len(names)} names for {self.count} rows of {config.weights}")
        self.beyond = frozenset(names[len(names[: config.limit]) :])
        names = names[: config.limit]
        self.row_of = {name: row for row, name in enumerate(names)}
        if len(self.row_of) < len(names):
            twice = next(name for row, name in enumerate(names) if self.row_of[name] != row)
            raise ValueError(f"{config.identities}: {twice!r} stands for several rows; give each a name of its own")

    def _check_pca(self, width: int) -> None:
        shapes = {name: shape_of(f"{self.config.pca}/{name}.pt") for name in ("mean", "std", "V")}
        wanted = {"mean": (1, self.layout.size), "std": (1, self.layout.size)}
        bad = [name for name, shape in wanted.items() if shapes[name] != shape]
        if bad or shapes["V"][0] != self.layout.size or shapes["V"][1] < width:
            raise ValueError(
                f"{self.config.pca} holds {shapes}; expected mean and std of {self.layout.size:,} numbers and V of "
                f"({self.layout.size}, at least {width}) for {self.config.weights}"
            )

    def people(self) -> Listed:
        """By name; with `photos`, where each one's lie. Raises ValueError if no name is among them."""
        listed = self._listed()
        listed.beyond = self.beyond
        return listed

    def _listed(self) -> Listed:
        if self.config.photos is None:
            return Listed({name: PersonRef(name) for name in sorted(self.row_of)})
        there = list_people(self.config.corpus)
        if not there.keys() & self.row_of.keys():
            raise ValueError(
                f"none of the {len(there)} people of {self.config.photos} (such as {min(there)!r}) is among the rows (such as "
                f"{min(self.row_of)!r}): identities=FILE names the rows as the photos' folders are named"
            )
        gone = ("no_photos", f"nobody of this name at {self.config.photos}")
        return Listed({name: there.get(name, PersonRef(name, problem=gone)) for name in sorted(self.row_of)})

    def vectors(self, rows: Sequence[int]) -> np.ndarray:
        """(P, N) float32."""
        found_PK = read_rows(self.config.weights, rows)
        if self.config.pca is None:
            return found_PK
        vectors_PN = np.empty((len(rows), self.layout.size), np.float32)
        for start in range(0, self.layout.size, BLOCK):
            block = slice(start, start + BLOCK)
            vectors_PN[:, block] = found_PK @ read_rows(f"{self.config.pca}/V.pt", block, found_PK.shape[1]).T
        return vectors_PN * read_rows(f"{self.config.pca}/std.pt") + read_rows(f"{self.config.pca}/mean.pt")

    def fingerprint(self) -> str:
        """16 hex digits of some rows, so that another file does not go on with this corpus."""
        some = sorted({round(row) for row in np.linspace(0, self.count - 1, 16)})
        return hashlib.sha256(read_rows(self.config.weights, some).tobytes()).hexdigest()[:16]

    def manifest(self) -> Manifest:
        """The recipe is that of configs/sd15.yaml, and which file the rows came from. Nobody can compute the fingerprint of the
        base model here: it was not loaded, so its name decides what belongs together."""
        corpus, recogniser, folder = self.config.corpus, "", ""
        if self.config.photos is not None:
            recogniser, folder = FaceEmbedder(corpus.embedder).fingerprint, folder_fingerprint(corpus.embedder)
        return Manifest(
            layout=self.layout.to_dict(),
            base={"name": self.config.base, "fingerprint": ""},
            recogniser={"name": corpus.embedder.model, "fingerprint": recogniser},
            recipe={**corpus.recipe(folder), "weights2weights": self.fingerprint()},
        )


class ShardImporter:
    """Copies rows and commits whole shards; one in each worker. Memory: the rows of one shard."""

    def __init__(self, config: ImportConfig) -> None:
        self.config, self.source = config, Source(config)
        store = open_store(config.output)
        corpus = config.corpus
        self.finetune, self.writer = (
            corpus.finetune,
            ShardWriter(store, CorpusReader(store).manifest, corpus.vector_dtype),
        )

    def __call__(self, shard: ShardPlan, people: Sequence[PersonRef | EmbeddedPerson]) -> ShardReport:
        """Raises StoreError, and ValueError if a file is no longer what it was."""
        if self.config.embeddings is not None:
            embedded = self._with_embeddings(shard, [person for person in people if isinstance(person, PersonRef)])
        else:
            embedded = [person for person in people if isinstance(person, EmbeddedPerson)]
        failures = [failure for person in embedded for failure in person.failures]
        usable = [person for person in embedded if person.usable]
        vectors_PN = self.source.vectors([self.source.row_of[person.identity] for person in usable])
        vectors_PN = vectors_PN.astype(self.writer.schema.field("vector").type.value_type.to_pandas_dtype())
        done = []
        for person, vector_N in zip(usable, vectors_PN, strict=True):
            if np.isfinite(vector_N).all():
                done.append(self._row(person, vector_N))
            else:
                message = (
                    f"row {self.source.row_of[person.identity]} holds NaN, infinity, or what is too large for float16"
                )
                failures.append(Failure(person.position, person.identity, None, "read", "not_finite", message))
        info = self.writer.commit(shard, done, failures)
        return ShardReport.of(info)

    def _with_embeddings(self, shard: ShardPlan, people: Sequence[PersonRef]) -> list[EmbeddedPerson]:
        assert self.config.embeddings is not None
        rows = [self.source.row_of[person.identity] for person in people if not person.problem]
        faces_PE = iter(read_rows(self.config.embeddings, rows))
        return [
            self._refused(position, person.identity, "read", *person.problem)
            if person.problem  # who was forgotten, or is no longer among the rows
            else self._with_embedding(position, person.identity, next(faces_PE))
            for position, person in zip(shard.positions, people, strict=True)
        ]

    def _with_embedding(self, position: int, name: str, row_E: np.ndarray) -> EmbeddedPerson:
        length = float(np.linalg.norm(row_E))
        if not (math.isfinite(length) and length > 1e-6):
            return self._refused(position, name, "embed", "bad_embedding", "the embedding is zero or not finite")
        unit_E = row_E / length
        return EmbeddedPerson(position, name, embedding=unit_E, photo_embeddings=unit_E[None])

    @staticmethod
    def _refused(position: int, name: str, stage: str, reason: str, message: str) -> EmbeddedPerson:
        return EmbeddedPerson(position, name, failures=(Failure(position, name, None, stage, reason, message),))

    def _row(self, person: EmbeddedPerson, vector_N: np.ndarray) -> Person:
        """What nobody wrote down of a published row is NaN, and its seconds are 0."""
        assert person.embedding is not None
        assert person.photo_embeddings is not None
        measured: dict[str, Any] = {
            "similarity": NAN,
            "base_similarity": NAN,
            "loss": NAN,
            "finetune_seconds": 0.0,
            "score_seconds": 0.0,
        }
        return Person(
            position=person.position,
            identity=person.identity,
            vector=vector_N,
            embedding=person.embedding,
            photo_embeddings=person.photo_embeddings,
            photo_similarity=person.photo_similarity,
            steps=self.finetune.steps,
            seed=self.finetune.seed,
            num_photos=len(person.photo_sha256),
            num_photos_dropped=sum(failure.photo is not None for failure in person.failures),
            photo_sha256=person.photo_sha256,
            embed_seconds=person.seconds,
            **measured,
        )


def _first(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
