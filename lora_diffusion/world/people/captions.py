"""What a picture of a synthetic person shows, in words: the captions that the base model learns from.

Two halves, joined by commas: who is seen (``describe_person``, from the identity) and how (``describe_view``: expression,
pose, light, background, clothes). Left and right are the viewer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lora_diffusion.world.people.traits import Traits
from lora_diffusion.world.people.views import View

# An adjective is said when its latent is at least NOTABLE deviations out, with "very" from STRIKING on.
NOTABLE = 0.7
STRIKING = 1.4

# part of the face -> latent -> (adjective when it is low, adjective when it is high); no adjective, nothing is said
FACE_WORDS: dict[str, dict[str, tuple[str, str]]] = {
    "head": {
        "head-fat": ("thin", "fat"),
        "head-scale-horiz": ("narrow", "wide"),
        "head-scale-vert": ("flat", "tall"),
        "head-scale-depth": ("shallow", "deep"),
        "head-roundrect": ("rectangular", "round"),
        "head-tri": ("triangular", "tapered"),
        "head-sqoval": ("square", "oval"),
        "head-diamond": ("", "diamond"),
        "head-back-scale-depth": ("short", "long"),
    },
    "forehead": {
        "forehead-scale-vert": ("low", "high"),
        "forehead-nubian": ("smooth", "domed"),
        "forehead-temple": ("narrow", "broad"),
        "forehead-trans": ("receding", "bulging"),
    },
    "eyebrows": {
        "eyebrows-angle": ("sad", "stern"),
        "eyebrows-trans": ("low", "high"),
        "brow_thick": ("thin", "thick"),
        "brow_arch": ("flat", "arched"),
        "brow_len": ("short", "long"),
        "brow_gap": ("parted", "joined"),
        "brow_dark": ("fair", "dark"),
        "brow_y": ("sunken", "raised"),
    },
    "eyes": {
        "{s}-eye-scale": ("small", "large"),
        "{s}-eye-trans-x": ("close", "distant"),
        "{s}-eye-trans-y": ("low", "high"),
        "{s}-eye-corner1": ("drooping", "lifted"),
        "{s}-eye-corner2": ("sloping", "slanted"),
        "{s}-eye-epicanthus": ("bare", "folded"),
        "{s}-eye-height2": ("narrow", "open"),
        "{s}-eye-bag": ("fresh", "baggy"),
        "{s}-eye-eyefold": ("heavy", "light"),
        "{s}-eye-push2": ("deep", "bulging"),
        "eye_dark": ("clear", "shadowed"),
    },
    "nose": {
        "nose-scale-horiz": ("narrow", "wide"),
        "nose-scale-vert": ("short", "long"),
        "nose-scale-depth": ("flat", "big"),
        "nose-hump": ("scooped", "hooked"),
        "nose-curve": ("concave", "convex"),
        "nose-point": ("drooping", "upturned"),
        "nose-point-width": ("pointed", "blunt"),
        "nose-width1": ("pinched", "bridged"),
        "nose-width2": ("thin", "thick"),
        "nose-width3": ("lean", "fleshy"),
        "nose-volume": ("slim", "bulbous"),
        "nose-nostrils-width": ("tight", "flared"),
        "nose-flaring": ("smooth", "winged"),
        "nose-base": ("lowered", "lifted"),
        "nose-trans": ("low", "high"),
        "nose-greek": ("notched", "greek"),
    },
    "mouth": {
        "mouth-scale-horiz": ("small", "wide"),
        "mouth-scale-vert": ("flat", "tall"),
        "mouth-trans": ("low", "high"),
        "mouth-angles": ("drooping", "lifted"),
        "mouth-trans-z": ("sunken", "pouting"),
        "lip_sat": ("pale", "rosy"),
    },
    "upper lip": {
        "mouth-upperlip-height": ("short", "long"),
        "mouth-upperlip-volume": ("thin", "full"),
        "mouth-cupidsbow": ("straight", "bowed"),
    },
    "lower lip": {
        "mouth-lowerlip-height": ("short", "long"),
        "mouth-lowerlip-volume": ("thin", "full"),
    },
    "chin": {
        "chin-width": ("narrow", "broad"),
        "chin-height": ("short", "long"),
        "chin-prominent": ("weak", "strong"),
        "chin-jaw-drop": ("high", "low"),
        "chin-bones": ("smooth", "bony"),
        "chin-cleft": ("plain", "cleft"),
        "chin-triangle": ("", "pointed"),
        "chin-prognathism": ("receding", "jutting"),
        "neck-double": ("tight", "double"),
    },
    "cheeks": {
        "{s}-cheek-bones": ("flat", "high"),
        "{s}-cheek-volume": ("hollow", "full"),
        "{s}-cheek-inner": ("lean", "soft"),
        "blush": ("pale", "rosy"),
        "weight": ("thin", "fat"),
    },
    "ears": {
        "{s}-ear-scale": ("small", "large"),
        "{s}-ear-wing": ("flat", "protruding"),
        "{s}-ear-lobe": ("short", "long"),
    },
    "neck": {"neck-scale-horiz": ("thin", "thick")},
}


def _step(value: float, words: list[tuple[float, str]]) -> str:
    return next(word for limit, word in words if value < limit)


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


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


def _noun(p: Traits) -> str:
    age = _step(p.age, [(0.12, "young "), (0.3, ""), (0.48, "middle aged "), (9, "elderly ")])
    strongest = int(np.argmax(p.ancestry))
    ancestry = ("african ", "asian ", "european ")[strongest] if p.ancestry[strongest] > 0.5 else ""
    return _a(f"{age}{ancestry}{person_class(p)}")


def look_phrases(p: Traits) -> list[str]:
    """Hair, skin, beard, freckles, lipstick and the colour of the eyes, the most visible first."""
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
    return [*phrases, eyes]


def face_phrases(latents: Mapping[str, float], keep: Callable[[], bool] = lambda: True) -> list[str]:
    """``very wide hooked nose`` and the like: one phrase for each part of the face that has anything to say.

    ``latents``: the identity's latent numbers by name (deviations from the mean person). ``keep``: asked for each
    adjective whether it is said.
    """
    phrases = []
    for part, words in FACE_WORDS.items():
        said = []
        for latent, (low, high) in words.items():
            word = high if latents[latent] > 0 else low
            if word and abs(latents[latent]) >= NOTABLE and keep():
                said.append(f"very {word}" if abs(latents[latent]) >= STRIKING else word)
        if said:
            phrases.append(f"{' '.join(said)} {part}")
    return phrases


def describe_person(p: Traits, latents: Mapping[str, float]) -> str:
    """The person in one phrase: hair, skin, beard, eyes, and what is striking about the face."""
    striking = {name: value if abs(value) >= STRIKING else 0.0 for name, value in latents.items()}
    return f"{_noun(p)} with {', '.join(look_phrases(p) + face_phrases(striking))}"


def _turned(yaw: float) -> str:
    if abs(yaw) < 12:
        return "facing the camera"
    side = "left" if yaw < 0 else "right"
    return f"turned slightly {side}" if abs(yaw) < 35 else f"in profile facing {side}"


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

    Half describe the person, the face in detail, so that the model knows what hair, beards and noses are and LoRAs find
    directions to move along; half say only "person", so that the class noun and the rare word "sks" mean anybody.
    Phrases are left out at random; one caption in ten is empty, for classifier-free guidance.
    """
    u = rng.random()
    if u < 0.1:
        return ""
    said = [phrase for phrase in view_phrases(view, p)[: 9 if u < 0.55 else 5] if rng.random() < 0.88]
    if u < 0.55:
        rate = 1.0 if u < 0.35 else rng.random()  # often everything: what is not said is then average
        seen = [phrase for phrase in look_phrases(p) if rng.random() < max(rate, 0.65)]
        subject = f"{_noun(p)} with {', '.join(seen)}" if seen else _noun(p)
        # the face last: should the caption be too long for the model, its least visible part is cut
        said += face_phrases(latents, lambda: rng.random() < rate)
    else:
        subject = rng.choice(
            ["sks person", "person", f"sks {person_class(p)}", person_class(p)], p=[0.5, 0.25, 0.1, 0.15]
        )
    return f"a photo of {subject}, {', '.join(said)}".rstrip(", ")
