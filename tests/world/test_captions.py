"""What the captions of synthetic people promise to the base model that learns from them."""

import numpy as np
import pytest

from lora_diffusion.world.people import sample_person, sample_view
from lora_diffusion.world.people.captions import (
    FACE_WORDS,
    NOTABLE,
    STRIKING,
    describe_person,
    face_phrases,
    subject_caption,
    training_caption,
)
from lora_diffusion.world.people.latents import LATENT_NAMES

AVERAGE = dict.fromkeys(LATENT_NAMES, 0.0)


def test_every_word_for_a_face_belongs_to_a_latent_and_says_its_sign() -> None:
    for part, words in FACE_WORDS.items():
        for latent, (low, high) in words.items():
            assert latent in LATENT_NAMES
            for value, word in ((-NOTABLE, low), (NOTABLE, high), (-STRIKING, low), (STRIKING, high)):
                very = "very " if abs(value) >= STRIKING else ""
                assert face_phrases(AVERAGE | {latent: value}) == ([f"{very}{word} {part}"] if word else [])


def test_no_part_of_a_face_uses_one_word_for_two_things() -> None:
    for part, words in FACE_WORDS.items():
        adjectives = [word for pair in words.values() for word in pair if word]
        assert len(adjectives) == len(set(adjectives)), part


def test_an_average_face_has_nothing_to_say() -> None:
    assert face_phrases(AVERAGE) == []


def test_the_order_of_the_words_is_that_of_the_face_whatever_is_left_out() -> None:
    latents = sample_person(7).latents
    everything = " ".join(face_phrases(latents)).split()
    rng = np.random.default_rng(0)
    some = " ".join(face_phrases(latents, lambda: rng.random() < 0.5)).split()
    remaining = iter(everything)
    assert len(some) < len(everything)
    assert all(word in remaining for word in some)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_the_subjects_caption_tells_the_scene_and_nothing_of_the_person(number: int) -> None:
    person, view = sample_person(number), sample_view(number, 0)
    caption = subject_caption(view, person.traits)
    assert view.expression in caption
    assert f"{view.background} background" in caption
    assert not set(face_phrases(person.latents)) & set(caption.split(", "))
    assert describe_person(person.traits, person.latents) not in caption


def test_training_captions_describe_say_only_person_or_are_empty_in_known_shares() -> None:
    person, view, rng = sample_person(3), sample_view(3, 0), np.random.default_rng(0)
    captions = [training_caption(view, person.traits, person.latents, rng) for _ in range(2000)]
    empty = np.mean([caption == "" for caption in captions])
    described = np.mean([" with " in caption or " nose" in caption for caption in captions])
    sks = np.mean(["sks" in caption for caption in captions])
    assert abs(empty - 0.10) < 0.03
    assert 0.38 < described < 0.48
    assert abs(sks - 0.45 * 0.6) < 0.04
