"""From latents to what they mean: age, colours, hair, beard, brows, glasses, marks of one person."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lora_diffusion.world.people.maths import Array, f32, mix, sigmoid, smoothstep


@dataclass(frozen=True, eq=False)
class Traits:
    """Semantic parameters of a person. All run from 0 (none) to 1 (full) where no unit is given.

    Lengths are in head units: the mean face is about 1.4 wide and 2.2 high (1 unit is roughly 10 cm).
    """

    gender: float  # presentation: 0 female .. 1 male
    age: float  # 0 young adult .. 0.75 very old
    ancestry: Array  # (3,) weights of the African, Asian and European means, sum 1
    melanin: float  # skin: 0.02 very pale .. 1 very dark
    undertone: float  # about N(0, 0.5): negative rosy, positive golden
    weight: float
    muscle: float
    # hair on the head
    hair_mel: float  # 0 blond .. 1 black
    hair_red: float
    grey: float
    bald: float
    hair_len: float  # below 0.06 shaven, 0.34 short, 0.66 shoulder
    hair_vol: float
    curl: float
    hairline: float  # height of the hairline above the mean, head units
    temple: float  # how far the temples recede
    part: float  # -1 .. 1: side of the parting
    fringe: float
    side: float  # thickness at the sides
    bun: float
    quiff: float
    # facial hair
    stubble: float
    moustache: float
    goatee: float
    beard: float
    beard_len: float  # 0.25 .. 1
    # eyebrows: head units, in face coordinates
    brow_thick: float
    brow_arch: float
    brow_len: float  # |x| of the outer end
    brow_gap: float  # |x| of the inner end
    brow_dark: float
    brow_y: float
    # eyes, lips, skin
    iris_mel: float  # below about 0.5 blue or green, above brown
    iris_hue: float  # light eyes: 0 blue .. 1 green
    lip_sat: float
    makeup: float
    freckle: float
    blush: float
    eye_dark: float  # shadows under the eyes
    # glasses this person would wear, and whether by habit
    glasses: bool
    gl_round: float  # 0 square .. 1 round
    gl_size: float  # factor, 1 is the mean
    gl_col: float  # below 0.6 black, 0.85 brown, above silver
    gl_thick: float
    # marks
    tex: Array  # (3,) where in the noise volume this person's textures lie
    moles: tuple[float, float, float]

    def attributes(self) -> dict[str, float]:
        """What people would name, as labels for `edit`."""
        return {
            "beard": self.beard,
            "moustache": self.moustache,
            "glasses": float(self.glasses),
            "long hair": self.hair_len,
            "dark hair": self.hair_mel,
            "grey hair": self.grey,
            "bald": self.bald,
            "dark skin": self.melanin,
            "older": self.age,
            "male": self.gender,
        }


def decode(latents: Mapping[str, float]) -> Traits:
    """Traits of the person with these latents. Deterministic; continuous, but for glasses, which are worn or not."""
    z = latents
    gender = sigmoid(4.5 * z["gender"])
    quantile = 0.5 * (1 + math.erf(z["age"] / math.sqrt(2)))  # uniform 0..1
    age = 0.75 * quantile**2.0  # squared: young faces are the majority

    logits = np.array([z["anc_a"], z["anc_b"], z["anc_c"]]) * 1.7
    ancestry = np.exp(logits - logits.max())
    ancestry /= ancestry.sum()
    african, _, european = ancestry
    melanin = float(np.clip(ancestry @ [0.80, 0.36, 0.17] + 0.13 * z["melanin"], 0.02, 1.0))

    bald = float(smoothstep(0.6, 1.5, z["balding"] + 2.0 * (gender - 0.9) + 1.3 * (age - 0.3)))
    hair_len = sigmoid(2.3 * z["hair_len"] + mix(2.1, -2.9, gender)) * (1 - 0.85 * bald)
    hair_mel = np.clip(ancestry @ [0.97, 0.90, 0.46] + (0.10 + 0.26 * european) * z["hair_mel"], 0.03, 1)
    tied = smoothstep(0.8, 1.2, z["bun"] - 0.8 * smoothstep(0.4, 0.7, gender)) * smoothstep(0.35, 0.6, hair_len)

    grows = smoothstep(0.6, 0.85, gender)  # facial hair
    full_beard = z["fullbeard"]

    return Traits(
        gender=gender,
        age=age,
        ancestry=ancestry,
        melanin=melanin,
        undertone=0.5 * z["undertone"],
        weight=float(np.clip(0.5 + 0.2 * z["weight"], 0, 1)),
        muscle=float(np.clip(0.5 + 0.15 * z["muscle"], 0, 1)),
        hair_mel=float(hair_mel),
        hair_red=float(np.clip((z["hair_red"] - 0.5) * 0.8, 0, 1) * (0.3 + 0.7 * european)),
        grey=float(smoothstep(0.36, 0.80, age + 0.13 * z["hair_grey"])),
        bald=bald,
        hair_len=float(hair_len),
        hair_vol=float(sigmoid(1.2 * z["hair_vol"])),
        curl=float(np.clip(sigmoid(1.6 * z["hair_curl"] - 1.2 + 2.6 * (african - 0.2)), 0, 1)),
        hairline=0.10 * z["hairline"] * 0.7 - 0.08 * age * gender,
        temple=float(np.clip(0.06 + 0.06 * z["temple"] + 0.14 * gender * age, 0, 0.35)),
        part=float(np.tanh(z["part"])),
        fringe=float(smoothstep(0.15, 1.3, z["fringe"] + mix(0.25, -0.25, gender))),
        side=float(sigmoid(1.3 * z["side_thick"] - mix(0, 0.8, gender))),
        bun=float(tied * (1 - bald)),
        quiff=float(sigmoid(1.5 * z["quiff"])),
        stubble=float(grows * sigmoid(1.5 * z["beard_stub"])),
        moustache=float(grows * smoothstep(0.4, 1.1, z["moustache"] + 0.5 * full_beard)),
        goatee=float(grows * smoothstep(0.5, 1.2, z["goatee"] + 0.5 * full_beard)),
        beard=float(grows * smoothstep(0.4, 1.0, full_beard)),
        beard_len=float(0.25 + 0.75 * sigmoid(1.3 * z["beard_len"])),
        brow_thick=mix(0.034, 0.048, gender) * math.exp(0.28 * z["brow_thick"]),
        brow_arch=mix(0.055, 0.035, gender) + 0.028 * z["brow_arch"],
        brow_len=0.56 + 0.03 * z["brow_len"],
        brow_gap=0.105 - 0.022 * z["brow_gap"],
        brow_dark=float(np.clip(0.78 + 0.15 * z["brow_dark"], 0.3, 1)),
        brow_y=0.022 * z["brow_y"],
        iris_mel=float(np.clip(ancestry @ [1.0, 0.95, 0.42] + 0.33 * european * 1.3 * z["iris_mel"], 0, 1)),
        iris_hue=float(sigmoid(1.5 * z["iris_hue"])),
        lip_sat=float(sigmoid(1.0 * z["lip_sat"] + mix(0.2, -1.3, gender))),
        makeup=float(smoothstep(0.2, 1.6, z["makeup"]) * (1 - smoothstep(0.3, 0.6, gender))),
        freckle=float(smoothstep(0.5, 1.8, z["freckle"]) * (1 - melanin)),
        blush=float(sigmoid(z["blush"])),
        eye_dark=float(sigmoid(z["eye_dark"] - 0.4)),
        glasses=z["glasses"] > 0.9,
        gl_round=float(sigmoid(2 * z["gl_round"])),
        gl_size=1 + 0.12 * float(np.tanh(z["gl_size"])),
        gl_col=float(sigmoid(2 * z["gl_col"])),
        gl_thick=float(sigmoid(1.5 * z["gl_thick"])),
        tex=np.array([z["tex_x"], z["tex_y"], z["tex_z"]], f32),
        moles=(_mole(z["mole1"]), _mole(z["mole2"]), _mole(z["mole3"])),
    )


def _mole(latent: float) -> float:
    return float(smoothstep(0.7, 1.1, latent))
