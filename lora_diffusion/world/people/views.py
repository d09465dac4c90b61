"""What may change from one photo of a person to the next: pose, expression, light, place, clothes, camera."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# Expression -> blendshape weights (names of the face units; a name without side moves both sides).
EXPRESSIONS: Mapping[str, Mapping[str, float]] = {
    "neutral": {"mouthSmile": 0.08, "browInnerUp": 0.12},
    "slight smile": {"mouthSmile": 0.45, "cheekSquint": 0.2},
    "smiling": {"mouthSmile": 0.85, "cheekSquint": 0.45, "eyeSquint": 0.25, "mouthDimple": 0.3},
    "laughing": {
        "mouthSmile": 0.9,
        "jawOpen": 0.30,
        "mouthUpperUp": 0.55,
        "cheekSquint": 0.6,
        "eyeSquint": 0.35,
        "mouthLowerDown": 0.3,
    },
    "sad": {"mouthFrown": 0.75, "browInnerUp": 0.8, "mouthShrugLower": 0.3},
    "angry": {"browDown": 0.95, "noseSneer": 0.35, "mouthPress": 0.5, "mouthFrown": 0.3, "eyeSquint": 0.25},
    "surprised": {"eyeWide": 0.9, "browInnerUp": 0.8, "browOuterUp": 0.8, "jawOpen": 0.55},
    "talking": {"jawOpen": 0.28, "mouthFunnel": 0.25, "mouthUpperUp": 0.1},
    "eyes closed": {"eyeBlink": 1.0},
    "pouting": {"mouthPucker": 0.8},
}
EXPRESSION_ODDS = np.array([0.24, 0.15, 0.16, 0.10, 0.06, 0.06, 0.06, 0.08, 0.05, 0.04])

Colour = tuple[float, float, float]
CLOTH_COLOURS: Mapping[str, Colour] = {  # display colours
    "white": (0.90, 0.90, 0.88),
    "black": (0.06, 0.06, 0.07),
    "grey": (0.45, 0.45, 0.47),
    "navy": (0.10, 0.14, 0.30),
    "red": (0.66, 0.10, 0.12),
    "green": (0.14, 0.38, 0.20),
    "light blue": (0.50, 0.68, 0.86),
    "yellow": (0.88, 0.72, 0.18),
    "pink": (0.88, 0.55, 0.65),
    "purple": (0.38, 0.20, 0.50),
    "brown": (0.38, 0.25, 0.15),
    "orange": (0.88, 0.45, 0.12),
    "beige": (0.80, 0.72, 0.58),
    "teal": (0.10, 0.45, 0.47),
}
NECKLINES = ("crew neck", "v-neck", "high collar", "shirt")


@dataclass(frozen=True)
class LightSetup:
    """One key light far away and a dome of ambient light. Colours are linear and may exceed 1."""

    azimuth: float  # degrees, 0 in front of the face, positive to the viewer's right
    elevation: float  # degrees above the horizon
    key_colour: Colour
    key: float
    ambient_colour: Colour
    ambient: float


LIGHTS: Mapping[str, LightSetup] = {
    "soft daylight": LightSetup(25, 35, (1, 0.98, 0.95), 0.75, (0.95, 0.98, 1.05), 0.62),
    "studio light": LightSetup(-35, 30, (1, 1, 1), 1.05, (1, 1, 1), 0.40),
    "side light": LightSetup(-78, 12, (1, 0.97, 0.92), 1.35, (1, 1, 1), 0.25),
    "warm evening light": LightSetup(55, 15, (1.15, 0.82, 0.55), 1.15, (0.75, 0.80, 1.0), 0.32),
    "cool light": LightSetup(-20, 40, (0.82, 0.94, 1.15), 0.9, (0.85, 0.95, 1.1), 0.42),
    "overhead light": LightSetup(5, 72, (1, 0.98, 0.94), 1.2, (1, 0.98, 0.95), 0.34),
    "flash": LightSetup(3, 8, (1, 1, 1), 1.05, (1, 1, 1), 0.25),
    "backlight": LightSetup(160, 35, (1.1, 1.0, 0.9), 1.5, (1, 1, 1), 0.50),
    "dim light": LightSetup(40, 45, (1, 0.9, 0.78), 0.50, (0.9, 0.92, 1.0), 0.25),
}
LIGHT_ODDS = np.array([0.22, 0.18, 0.10, 0.11, 0.10, 0.08, 0.09, 0.05, 0.07])

BACKGROUNDS = (
    *("white studio", "grey studio", "dark studio"),
    *("blue wall", "red wall", "yellow wall", "green wall", "brick wall"),
    *("garden", "beach", "forest", "city street", "sunset sky", "office", "library", "night lights"),
)

# "toggle glasses": whoever wears glasses takes them off, whoever does not puts them on.
# "unshaven": men show stubble (women and beards are as usual).
ACCESSORIES = ("as usual", "toggle glasses", "unshaven")


@dataclass(frozen=True)
class View(Mapping[str, Any]):
    """One photo's circumstances. Angles in degrees; left and right are the viewer's.

    Also reads as a mapping (``view["light"]``, ``dict(view)``), like the rows that tables and JSON files hold.
    """

    yaw: float  # of the head, positive to the right
    pitch: float  # positive downwards
    roll: float
    cam_yaw: float  # the camera walks round the person
    expression: str  # key of EXPRESSIONS
    intensity: float  # of the expression, about 0.7 .. 1.1
    gaze: tuple[float, float]  # of the eyes against the head: right, up
    light: str  # key of LIGHTS
    light_jit: tuple[float, float]  # added to the light's azimuth and elevation
    background: str  # one of BACKGROUNDS
    bg_seed: int  # where the background's things stand; also the folds of the cloth
    cloth: str  # key of CLOTH_COLOURS
    neck: str  # one of NECKLINES
    zoom: float  # 1: the face fills about half of the picture's height
    shift: tuple[float, float]  # of the picture, in picture widths: right, down
    accessory: str  # one of ACCESSORIES
    stubble: float  # how dark it is where the accessory is "unshaven", 0.5 .. 1
    exposure: float  # factor on all light
    noise: float  # standard deviation of the film grain, in display units 0..1
    warm: float  # white balance: red times 1 + warm, blue times 1 - warm
    seed: int  # of the film grain

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> View:
        """Inverse of ``dict(view)``, also after a trip through JSON, which makes lists of tuples."""
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**plain)


def draw_view(rng: np.random.Generator) -> View:
    """A random view. The order of the draws is part of the format: a new field must draw last."""
    yaw = float(np.clip(rng.normal(0, 24), -65, 65))
    pitch = float(np.clip(rng.normal(0, 8), -22, 22))
    roll = float(rng.normal(0, 4.5))
    cam_yaw = float(rng.normal(0, 8))
    expression = list(EXPRESSIONS)[rng.choice(len(EXPRESSIONS), p=EXPRESSION_ODDS)]
    intensity = float(rng.uniform(0.7, 1.1))
    gaze = (float(rng.normal(0, 8)), float(rng.normal(0, 4)))
    light = list(LIGHTS)[rng.choice(len(LIGHTS), p=LIGHT_ODDS)]
    light_jit = (float(rng.normal(0, 12)), float(rng.normal(0, 7)))
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    bg_seed = int(rng.integers(2**31))
    cloth = list(CLOTH_COLOURS)[rng.integers(len(CLOTH_COLOURS))]
    neck = NECKLINES[rng.integers(len(NECKLINES))]
    zoom = float(np.exp(rng.normal(0, 0.07)))
    shift = (float(rng.normal(0, 0.05)), float(rng.normal(0, 0.04)))
    u = rng.random()
    accessory = ACCESSORIES[0 if u < 0.85 else 1 if u < 0.94 else 2]
    stubble = float(rng.uniform(0.5, 1))
    exposure = float(np.exp(rng.normal(0, 0.12)))
    noise = float(rng.uniform(0, 0.010))
    warm = float(rng.normal(0, 0.03))
    return View(
        yaw=yaw,
        pitch=pitch,
        roll=roll,
        cam_yaw=cam_yaw,
        expression=expression,
        intensity=intensity,
        gaze=gaze,
        light=light,
        light_jit=light_jit,
        background=background,
        bg_seed=bg_seed,
        cloth=cloth,
        neck=neck,
        zoom=zoom,
        shift=shift,
        accessory=accessory,
        stubble=stubble,
        exposure=exposure,
        noise=noise,
        warm=warm,
        seed=int(rng.integers(2**31)),
    )
