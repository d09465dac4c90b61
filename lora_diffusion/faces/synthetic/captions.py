"""What a picture of a synthetic person shows, in words: the captions that the base model learns from.

Two halves, joined by commas: who is seen (``describe_person``, from the identity) and how (``describe_view``: expression,
pose, light, background, clothes). Left and right are the viewer's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lora_diffusion.faces.synthetic.traits import Traits
from lora_diffusion.faces.synthetic.views import View

# latent -> (words when it is low, words when it is high); said when the latent is at least this many deviations out
NOTABLE = 0.9
TRAITS: dict[str, tuple[str, str]] = {
    "head-fat": ("a thin face", "a round face"),
    "head-scale-horiz": ("a narrow head", "a wide head"),
    "forehead-scale-vert": ("a low forehead", "a high forehead"),
    "brow_thick": ("thin eyebrows", "thick eyebrows"),
    "brow_arch": ("flat eyebrows", "arched eyebrows"),
    "{s}-eye-scale": ("small eyes", "large eyes"),
    "{s}-eye-trans-x": ("close eyes", "wide set eyes"),
    "{s}-eye-height2": ("narrow eyes", "open eyes"),
    "nose-scale-horiz": ("a narrow nose", "a wide nose"),
    "nose-scale-vert": ("a short nose", "a long nose"),
    "nose-scale-depth": ("a flat nose", "a big nose"),
    "nose-hump": ("a curved nose", "a hooked nose"),
    "nose-point": ("a drooping nose", "an upturned nose"),
    "mouth-scale-horiz": ("a small mouth", "a wide mouth"),
    "mouth-lowerlip-volume": ("thin lips", "full lips"),
    "mouth-trans": ("a low mouth", "a high mouth"),
    "chin-width": ("a narrow chin", "a broad chin"),
    "chin-height": ("a short chin", "a long chin"),
    "chin-prominent": ("a weak chin", "a strong chin"),
    "{s}-cheek-bones": ("flat cheeks", "high cheekbones"),
    "{s}-cheek-volume": ("hollow cheeks", "full cheeks"),
    "{s}-ear-wing": ("flat ears", "protruding ears"),
    "neck-scale-horiz": ("a thin neck", "a thick neck"),
}


def _step(value: float, words: list[tuple[float, str]]) -> str:
    return next(word for limit, word in words if value < limit)


def _hair(p: Traits) -> str:
    if p.bald > 0.75:
        return "no hair"
    if p.grey > 0.55:
        colour = "grey"
    elif p.hair_red > 0.35 and p.hair_mel < 0.8:
        colour = "red"
    else:
        colour = _step(p.hair_mel, [(0.3, "blond"), (0.55, "light brown"), (0.78, "brown"), (9, "black")])
    if p.hair_len < 0.06:
        return f"very short {colour} hair"
    length = _step(p.hair_len, [(0.34, "short"), (0.66, "medium length"), (9, "long")])
    return (
        f"{length} {'curly ' if p.curl > 0.6 else ''}{colour} hair"
        + (" tied in a bun" if p.bun > 0.4 else "")
        + (" with bangs" if p.fringe > 0.5 and p.hair_len > 0.12 else "")
    )


def _beard(p: Traits) -> str | None:
    if p.beard > 0.5:
        return f"a {'long' if p.beard_len > 0.65 else 'short'} beard"
    if p.goatee > 0.5:
        return "a goatee"
    return "a moustache" if p.moustache > 0.5 else None


def person_class(p: Traits) -> str:
    """``man`` or ``woman``, by the presentation parameter (0 female .. 1 male)."""
    return "man" if p.gender > 0.5 else "woman"


def person_phrases(p: Traits, latents: Mapping[str, float]) -> tuple[str, list[str]]:
    """The noun phrase ("a young woman") and every "with ..." phrase of a person, the most visible first.

    ``p``: decoded parameters, ``latents``: the identity's latent numbers by name (deviations from the mean person).
    """
    age = _step(p.age, [(0.12, "young "), (0.3, ""), (0.48, "middle aged "), (9, "elderly ")])
    noun = f"{'an' if age.startswith('e') else 'a'} {age}{person_class(p)}"
    skin = _step(p.melanin, [(0.15, "pale"), (0.28, "light"), (0.42, "tan"), (0.62, "brown"), (9, "dark")])
    if p.iris_mel > 0.5:
        eyes = "brown eyes"
    else:
        eyes = "green eyes" if p.iris_hue > 0.5 else "blue eyes"
    phrases = [_hair(p), f"{skin} skin"]
    if beard := _beard(p):
        phrases.append(beard)
    if p.freckle > 0.5:
        phrases.append("freckles")
    if p.makeup > 0.5:
        phrases.append("red lipstick")
    phrases.append(eyes)
    for name, (low, high) in TRAITS.items():
        if abs(latents[name]) >= NOTABLE:
            phrases.append(high if latents[name] > 0 else low)
    return noun, phrases


def describe_person(p: Traits, latents: Mapping[str, float], traits: int = 3) -> str:
    """The person in one phrase: hair, skin, beard, and the first ``traits`` notable features of the face."""
    noun, phrases = person_phrases(p, latents)
    return f"{noun} with {', '.join(phrases[: 2 + traits])}"


def _turned(yaw: float) -> str:
    if abs(yaw) < 12:
        return "facing the camera"
    side = "left" if yaw < 0 else "right"
    return f"turned slightly {side}" if abs(yaw) < 35 else f"in profile facing {side}"


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def glasses_words(p: Traits) -> str:
    """``round black glasses`` and the like: what this person's glasses would be."""
    shape = "round" if p.gl_round > 0.5 else "square"
    return f"{shape} {_step(p.gl_col, [(0.6, 'black'), (0.85, 'brown'), (9, 'silver')])} glasses"


def view_phrases(view: View, p: Traits) -> list[str]:
    """Expression, pose, light, background, clothes, and the accessories of this view, each as one phrase."""
    top = "shirt" if view.neck == "shirt" else f"{view.neck} top"
    phrases = [
        view.expression,
        _turned(view.yaw + view.cam_yaw),
        view.light,
        f"{view.background} background",
        f"wearing {_a(view.cloth)} {top}",
    ]
    toggled = view.accessory == "toggle glasses"
    if bool(p.glasses) != toggled:
        phrases.append(glasses_words(p))
    if toggled and p.glasses:
        phrases.append("without glasses")
    if view.accessory == "unshaven" and p.gender > 0.65:
        phrases.append("unshaven")
    return phrases


def describe_view(view: View, p: Traits) -> str:
    """The view in words, for example ``smiling, turned slightly left, flash, beach background, wearing a red shirt``."""
    return ", ".join(view_phrases(view, p))


def subject_caption(view: View, p: Traits, subject: str = "sks person") -> str:
    """The DreamBooth caption of one photo: everything that may change is said, so that the subject's word keeps the rest.

    Glasses are part of the person: only a view that departs from the person's habit mentions them.
    """
    phrases = view_phrases(view, p)[:5]
    if view.accessory == "toggle glasses":
        phrases.append("without glasses" if p.glasses else glasses_words(p))
    if view.accessory == "unshaven" and p.gender > 0.65:
        phrases.append("unshaven")
    return f"a photo of {subject}, {', '.join(phrases)}"


def training_caption(view: View, p: Traits, latents: Mapping[str, float], rng: np.random.Generator) -> str:
    """One random caption for training the base model.

    Half describe the person (so the model knows what hair, beards and noses are), half say only "person" (so the class
    noun and the rare word "sks" mean anybody). Phrases are left out at random; one caption in ten is empty, for
    classifier-free guidance.
    """
    u = rng.random()
    if u < 0.1:
        return ""
    if u < 0.55:
        noun, phrases = person_phrases(p, latents)
        kept = [phrase for phrase in phrases if rng.random() < 0.65]
        subject = f"{noun} with {', '.join(kept)}" if kept else noun
        said = view_phrases(view, p)
    else:
        subject = rng.choice(
            ["sks person", "person", f"sks {person_class(p)}", person_class(p)], p=[0.5, 0.25, 0.1, 0.15]
        )
        said = view_phrases(view, p)[:5]
    return f"a photo of {subject}, {', '.join(s for s in said if rng.random() < 0.88)}".rstrip(", ")
