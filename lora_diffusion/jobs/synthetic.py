"""People who are rendered, not photographed: the one place where jobs meet the embedded world."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from lora_diffusion.synthesis.publish import Labels


def render_people(count: int, folder: str) -> None:
    """The first `count` people of the corpus' split, as photos in `folder`; nobody is rendered twice."""
    from lora_diffusion.world.people import SPLITS
    from lora_diffusion.world.people.dataset import TABLE, FacesConfig, FacesFolder, FacesWriter

    split = SPLITS["corpus"]
    if count > len(split):
        raise ValueError(f"people=synthetic:{count}: there are {len(split)} synthetic people for corpora")
    faces, writer = FacesFolder(folder, FacesConfig()), FacesWriter(folder, FacesConfig())
    missing = faces.missing(split[:count])
    if not missing and faces.store.exists(TABLE):
        return
    print(f"rendering {len(missing)} synthetic people to {folder}", flush=True)
    ray.get([ray.remote(_draw).remote(writer, missing[i : i + 4]) for i in range(0, len(missing), 4)])
    faces.finish()


def synthetic_labels(identities: Sequence[str]) -> Labels:
    """What rendered people look like, from the numbers in their names."""
    from lora_diffusion.world.people import sample_person

    people = [sample_person(int(identity.removeprefix("person-"))) for identity in identities]
    return {person.name: person.traits.attributes() for person in people}


def _draw(writer: Any, numbers: list[int]) -> None:
    writer({"numbers": numbers})
