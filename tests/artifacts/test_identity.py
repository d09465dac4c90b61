"""What belongs together is compared by what it is: each pair of artifacts that do not fit is refused, and says what to do."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory_world import make_config
from low_rank_corpus import BASE, LAYOUT, RECIPE, write_corpus
from serve_client import ADA
from serve_world import base_model, recogniser_id, save_synthesizer

from lora_diffusion.artifacts.identity import Identity, Mismatch, ModelId, read_identity
from lora_diffusion.cli import main
from lora_diffusion.config import from_dict
from lora_diffusion.corpus import CorpusConflict, CorpusReader, Manifest, open_corpus
from lora_diffusion.evaluation import EvaluationConfig, Scorer
from lora_diffusion.evaluation.ablation import AblationConfig
from lora_diffusion.evaluation.ablation_pipeline import check
from lora_diffusion.evaluation.held_out import PhotoEmbedder, Setup, choose
from lora_diffusion.evaluation.methods import check_fit
from lora_diffusion.faces.embedder import BUNDLED, EmbedderConfig, FaceEmbedder, folder_fingerprint
from lora_diffusion.faces.photos import load_photo
from lora_diffusion.factory.attempts import InMemoryAttempts
from lora_diffusion.factory.config import CorpusConfig
from lora_diffusion.factory.embed import PersonEmbedder
from lora_diffusion.factory.make import LoRAMaker
from lora_diffusion.factory.shard import ShardMaker
from lora_diffusion.lora import formats
from lora_diffusion.lora.layout import LoRALayout
from lora_diffusion.models.stable_diffusion import BaseModel
from lora_diffusion.personalize import Personalizer
from lora_diffusion.serving.config import ServeConfig
from lora_diffusion.serving.faces import FaceStage
from lora_diffusion.serving.latents import LatentStage
from lora_diffusion.serving.library import Library
from lora_diffusion.serving.services import Decoder, Denoiser, Renderer
from lora_diffusion.storage import open_store
from lora_diffusion.synthesis.publish import publish
from lora_diffusion.synthesis.synthesizer import Synthesizer
from lora_diffusion.synthesis.training.begin import begin, snapshot_of
from lora_diffusion.synthesis.training.train_config import TrainConfig

WRONG = r"was made with the recogniser tiny \(\w{20}\), this recogniser is tiny-b \(\w{20}\)\. Leave the recogniser out"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_synthesizer(tmp_path_factory.mktemp("synthesizer"))


@pytest.fixture(scope="module")
def of_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_synthesizer(tmp_path_factory.mktemp("of_b"), recogniser="tiny-b")


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-sd with one weight changed: the same layout, another model."""
    folder = tmp_path_factory.mktemp("other") / "tiny-sd"
    shutil.copytree(BUNDLED["tiny"].parent / "tiny-sd", folder)
    file = next((folder / "unet").glob("*.safetensors"))
    import safetensors.torch

    tensors = safetensors.torch.load_file(file)
    tensors["conv_in.bias"] += 0.01
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    return folder


def corpus(place: Path, recogniser: str = "tiny", **made_with: Any) -> CorpusReader:
    return write_corpus(open_store(place), 8, **{"recogniser": recogniser_id(recogniser), **made_with})


def old_folder(folder: Path, target: Path, **provenance: Any) -> Path:
    """A copy whose config.json says what an earlier release said."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["provenance"] |= provenance
    (target / "config.json").write_text(json.dumps(config))
    return target


# -- training ---------------------------------------------------------------------------------------------------------


def training(corpus: CorpusReader, output: Path, **values: Any) -> TrainConfig:
    return from_dict(TrainConfig, {"corpus": corpus.store.uri, "output": str(output), **values})


def test_training_takes_the_recogniser_of_the_corpus_and_refuses_another(tmp_path: Path) -> None:
    made = corpus(tmp_path / "corpus")
    assert snapshot_of(training(made, tmp_path / "a")).identity == made.manifest.identity
    with pytest.raises(Mismatch, match=rf"the corpus at {made.store.uri} {WRONG}"):
        begin(training(made, tmp_path / "a", recogniser="tiny-b"))
    assert not (tmp_path / "a").exists(), "nothing is written"
    copy = shutil.copytree(BUNDLED["tiny"], tmp_path / "my models")
    (copy / "det.onnx").write_bytes((BUNDLED["tiny-b"] / "det.onnx").read_bytes())  # a detector makes no embeddings
    moved = snapshot_of(training(made, tmp_path / "a", recogniser=str(copy))).identity.recogniser
    assert moved == ModelId(str(copy), made.manifest.identity.recogniser.fingerprint)


def test_a_run_that_an_earlier_release_began_goes_on_and_knows_its_recogniser(tmp_path: Path) -> None:
    made = corpus(tmp_path / "corpus")
    snapshot = begin(training(made, tmp_path / "run"))
    data = json.loads((tmp_path / "run" / "data.json").read_text())
    del data["recogniser"], data["start"]
    (tmp_path / "run" / "data.json").write_text(json.dumps(data))
    again = begin(training(made, tmp_path / "run"))
    assert (again, again.key) == (snapshot, snapshot.key)


# -- endpoint ---------------------------------------------------------------------------------------------------------


def test_the_endpoint_takes_the_recogniser_of_its_synthesiser_and_refuses_another(folder: Path, of_b: Path) -> None:
    assert FaceStage(ServeConfig(synthesizer=str(of_b)))._embedder.name == "tiny-b"
    with pytest.raises(Mismatch, match=rf"the synthesiser {folder} {WRONG}"):
        FaceStage(ServeConfig(synthesizer=str(folder), embedder={"model": "tiny-b"}))
    with pytest.raises(ValueError, match=r"there is no synthesiser at .*nowhere.*jobs/train.py"):
        FaceStage(ServeConfig(synthesizer=str(folder / "nowhere")))


def test_a_renderer_refuses_another_base_model(folder: Path, other_base: Path) -> None:
    config = ServeConfig(synthesizer=str(folder))
    library = Library(config)
    message = r"was made with the base model tiny-sd \(\w{20}\), this base model is .*other.*/tiny-sd \(\w{20}\)"
    with pytest.raises(Mismatch, match=message):
        Renderer(replace(config, base=str(other_base)), library, None)  # type: ignore[arg-type]
    about = asyncio.run(Renderer(replace(config, dtype="float16"), library, None).describe())  # type: ignore[arg-type]
    assert {"name": "tiny-sd", "fingerprint": base_model().fingerprint, "image_size": 64}.items() <= about.items()


def test_a_new_synthesiser_of_another_recogniser_or_base_is_not_taken_while_serving(
    folder: Path, of_b: Path, other_base: Path, tmp_path: Path
) -> None:
    models = LatentStage(ServeConfig(synthesizer=str(folder))).models
    current = models.current_id
    with pytest.raises(Mismatch, match=r"recogniser: tiny \(\w+\) there, tiny-b \(\w+\) here. Start another endpoint"):
        models.load(str(of_b))
    other = {"name": "tiny-sd", "fingerprint": BaseModel.from_pretrained(str(other_base)).fingerprint}
    with pytest.raises(Mismatch, match=r"base: tiny-sd \(\w+\) there, tiny-sd \(\w+\) here. Start another endpoint"):
        models.load(str(old_folder(folder, tmp_path / "a", base=other)))
    assert models.current_id == current
    assert models.load(str(save_synthesizer(tmp_path / "b", seed=5))) != current


def test_a_lora_file_of_the_endpoint_and_its_description_say_what_they_belong_to(folder: Path, tmp_path: Path) -> None:
    config = ServeConfig(synthesizer=str(folder), licence="mine")
    identity = read_identity(folder)

    async def ask() -> tuple[dict[str, Any], bytes, bytes]:
        from lora_diffusion.serving.messages import DecodeTask, LatentTask

        denoiser, decoder = Denoiser(config), Decoder(config, Library(config))
        code, _ = await denoiser.sample(LatentTask(np.eye(1, 512, dtype=np.float32)[0], 0, 1.0, 2, 1.0), 1e12)
        made, _ = await decoder.decode(DecodeTask(code, None, "kohya"), 1e12)
        uploaded = await decoder.accept(made.file or b"", "diffusers")
        return await denoiser.describe(), made.file or b"", uploaded.file or b""

    about, made, uploaded = asyncio.run(ask())
    assert Identity.from_dict(json.loads(json.dumps(about["identity"]))) == identity
    for name, data in (("made", made), ("uploaded", uploaded)):
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    metadata = formats.read_metadata(tmp_path / "made.safetensors")
    expected = {"base_model": "tiny-sd", "base_fingerprint": base_model().fingerprint, "recogniser": "tiny"}
    expected |= {"recogniser_fingerprint": recogniser_id("tiny")["fingerprint"], "licence": "mine"}
    assert expected.items() <= metadata.items()
    of_upload = formats.read_metadata(tmp_path / "uploaded.safetensors")
    assert of_upload["base_model"] == "tiny-sd"
    assert "recogniser" not in of_upload, "nobody knows how an uploaded LoRA was made"


# -- in this process --------------------------------------------------------------------------------------------------


def test_personalize_refuses_another_recogniser_or_base_model(
    folder: Path, of_b: Path, other_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(Mismatch, match=rf"the synthesiser {WRONG}"):
        Personalizer(folder, base_model(), recogniser="tiny-b")
    with pytest.raises(Mismatch, match="was made with the base model tiny-sd"):
        Personalizer(folder, str(other_base))
    assert Personalizer(of_b, base_model()).embedder.name == "tiny-b"
    copy = shutil.copytree(BUNDLED["tiny"], tmp_path / "buffalo")
    assert Personalizer(folder, base_model(), recogniser=str(copy)).embedder.name == str(copy)


def test_the_command_refuses_another_recogniser_and_its_file_says_what_it_belongs_to(
    folder: Path, tmp_path: Path
) -> None:
    words = ["personalize", str(ADA), "--out", str(tmp_path), "--synthesizer", str(folder), "--num-images", "0"]
    with pytest.raises(SystemExit, match=rf"lora-diffusion: the synthesiser {WRONG}"):
        main([*words, "--recogniser", "tiny-b"])
    main(words)
    metadata = formats.read_metadata(tmp_path / "lora.safetensors")
    assert read_identity(folder).metadata().items() <= metadata.items()


def test_a_photo_is_embedded_and_its_neighbours_are_looked_up_by_no_other_recogniser(folder: Path) -> None:
    model, stranger = Synthesizer.from_pretrained(folder), FaceEmbedder(EmbedderConfig("tiny-b"))
    with pytest.raises(Mismatch, match=WRONG):
        model.from_photo(ADA, embedder=stranger)
    with pytest.raises(Mismatch, match=WRONG):
        model.nearest(stranger.embed(load_photo(ADA)).vector, embedder=stranger)


# -- corpora that meet ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recogniser": "tiny-b"}, r"recogniser: tiny \(\w{20}\) there, tiny-b \(\w{20}\) here"),
        ({"base": {**BASE, "fingerprint": "f" * 16}}, r"base: none \(0123456789abcdef\) there, none \(f{16}\) here"),
        ({"recipe": {**RECIPE, "start": "ab"}}, "start: random there, ab here"),
        ({"recipe": {**RECIPE, "finetune": {"steps": 8, "seed": 0}}}, "finetune.steps: 80 there, 8 now"),
        ({"recipe": {**RECIPE, "photos": {"crop": "face"}}}, "photos.crop: None there, 'face' now"),
        ({"layout": LoRALayout.from_shapes({"a.to_q": (20, 16), "a.to_v": (24, 16)}, rank=1, alpha=2.0,
                                           target_modules=("to_q", "to_v"))}, "layout_id: "),
    ],
    ids=["recogniser", "base", "start", "steps", "crop", "layout"],
)  # fmt: skip
def test_held_out_people_must_have_been_made_as_the_corpus(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    learned, held = corpus(tmp_path / "learned"), corpus(tmp_path / "held", **change)
    with pytest.raises(Mismatch, match=rf"the held-out corpus at {held.store.uri} .*{message}.*Build both"):
        choose(held, learned, None)


def test_groups_scores_and_numbers_of_photos_may_differ(tmp_path: Path) -> None:
    recipe = {**RECIPE, "groups": {"people_per_group": 4, "groups_per_shard": 2}, "photos": {"min_photos": 2}}
    with pytest.raises(
        ValueError, match="held-out people are in the corpus too"
    ):  # they are the same people: all else fits
        choose(corpus(tmp_path / "a"), corpus(tmp_path / "b", recipe=recipe), None)


def test_an_ablation_refuses_a_corpus_of_another_recogniser(tmp_path: Path) -> None:
    places = {"corpus": corpus(tmp_path / "a").store.uri, "output": str(tmp_path / "out")}
    other = corpus(tmp_path / "b", recogniser="tiny-b", recipe={**RECIPE, "start": "ab"}).store.uri
    config = from_dict(AblationConfig, {"evaluation": places, "corpora": {"frozen": other}})
    with pytest.raises(
        Mismatch, match=r"corpus 'frozen'.* recogniser: tiny \(\w+\) there, tiny-b \(\w+\) here. Build it"
    ):
        check(config)


def test_an_evaluation_refuses_a_synthesiser_of_another_recogniser(folder: Path, of_b: Path, tmp_path: Path) -> None:
    layout, base = Synthesizer.from_pretrained(folder).layout, base_model()
    made_with = {"layout": layout, "base": {"name": "tiny-sd", "fingerprint": base.fingerprint}}
    reader = write_corpus(open_store(tmp_path), 2, **made_with, recogniser=recogniser_id("tiny"))
    check_fit({"mine": Synthesizer.from_pretrained(folder)}, reader)
    with pytest.raises(
        Mismatch, match=r"the synthesiser 'b' does not belong to the corpus.*recogniser.*Train it on this"
    ):
        check_fit({"b": Synthesizer.from_pretrained(of_b)}, reader)


def test_workers_of_an_evaluation_refuse_another_recogniser_or_base_than_the_corpus(
    folder: Path, other_base: Path, world: Path
) -> None:
    config, identity = EvaluationConfig(), read_identity(folder)
    made = CorpusConfig(people=str(world / "people"), output="", embedder=EmbedderConfig("tiny-b"))
    with pytest.raises(Mismatch, match=rf"the corpus {WRONG}"):
        PhotoEmbedder(Setup(config, made, identity), 64)
    with pytest.raises(ValueError, match=r"second_recogniser is tiny, the one that the corpus was made with.*null"):
        PhotoEmbedder(
            Setup(replace(config, second_recogniser="tiny"), replace(made, embedder=EmbedderConfig()), identity), 64
        )
    layout, nobody = Synthesizer.from_pretrained(folder).layout, np.zeros((2, 0, 512), np.float32)
    with pytest.raises(Mismatch, match="the corpus was made with the base model tiny-sd"):
        Scorer(Setup(config, replace(made, base=str(other_base)), identity), layout, nobody)


def test_directions_are_not_fitted_on_embeddings_of_another_recogniser(folder: Path, tmp_path: Path) -> None:
    made, labels = corpus(tmp_path / "corpus", recogniser="tiny-b"), {"person-000000": {"age": 1.0}}
    with pytest.raises(
        Mismatch, match=r"the corpus at .* does not belong to the synthesiser: recogniser: tiny .*tiny-b"
    ):
        publish(str(folder), str(tmp_path / "out"), {}, made.store.uri, labels)


def test_a_corpus_is_not_continued_with_another_start_or_recipe(tmp_path: Path) -> None:
    there = corpus(tmp_path).manifest
    for recipe, line in (
        ({**RECIPE, "start": "ab"}, "start: None there, 'ab' now"),
        ({**RECIPE, "finetune": {"steps": 8, "seed": 0}}, "finetune.steps: 80 there, 8 now"),
    ):
        with pytest.raises(CorpusConflict, match=line):
            open_corpus(open_store(tmp_path), replace(there, recipe=recipe))


# -- artifacts of earlier releases ------------------------------------------------------------------------------------


def test_a_synthesiser_of_an_earlier_release_is_believed_by_the_recogniser_s_name(folder: Path, tmp_path: Path) -> None:
    old = old_folder(folder, tmp_path / "old", recogniser={"name": "tiny"}, corpus={})
    model, identity = Synthesizer.from_pretrained(old), read_identity(old)
    assert identity == replace(read_identity(folder), recogniser=ModelId("tiny"), recipe_id="", start=None)
    model.check_recogniser(FaceEmbedder(EmbedderConfig("tiny")))
    assert FaceStage(ServeConfig(synthesizer=str(old)))._embedder.name == "tiny"
    fingerprint = recogniser_id("tiny-b")["fingerprint"]
    with pytest.raises(
        Mismatch, match=rf'tiny \(no fingerprint\).*If these.*write "fingerprint": "{fingerprint}" beside'
    ):
        model.check_recogniser(FaceEmbedder(EmbedderConfig("tiny-b")))
    nameless = Synthesizer.from_pretrained(old_folder(folder, tmp_path / "nameless", recogniser={}))
    with pytest.raises(ValueError, match=r"nobody wrote down which recogniser .*: name it yourself"):
        nameless.from_photo(ADA)


def test_fingerprints_of_earlier_releases_are_known_by_the_models_themselves(folder: Path, tmp_path: Path) -> None:
    tiny = FaceEmbedder(EmbedderConfig("tiny"))
    whole = folder_fingerprint(tiny.config)  # what a corpus of before notes in its recipe
    recipe = {**RECIPE, "embedder": {"fingerprint": whole}}
    old = Manifest(LAYOUT.to_dict(), {"name": "tiny-sd", "fingerprint": "95a6a9ba0026c015"}, recipe,
                   {"embedder": {"model": "tiny"}})  # fmt: skip
    assert old.identity.recogniser == ModelId("tiny", whole)
    old.identity.check_recogniser(tiny, "it")
    old.identity.check_base(BaseModel.from_pretrained("tiny-sd", dtype=torch.bfloat16), "it")
    with pytest.raises(Mismatch, match="tiny-b"):
        old.identity.check_recogniser(FaceEmbedder(EmbedderConfig("tiny-b")), "it")
    new = read_identity(folder)
    assert not old.identity.differences(replace(new, layout_id=None)), (
        "names decide where fingerprints cannot be compared"
    )
    assert old.identity.differences(read_identity("tiny"), ("recogniser",)) == []


def test_what_was_made_for_the_model_with_its_soft_decoder_fits_the_sharp_one() -> None:
    base = BaseModel.from_pretrained("tiny-sd")
    soft, sharp = (Identity(ModelId("tiny-sd", of)) for of in ("b486db5bb0ed5c8a64c0", base.fingerprint))
    assert base.fingerprint != soft.base.fingerprint
    assert Identity.from_dict(soft.to_dict()).differences(sharp) == []
    Identity.from_dict(soft.to_dict()).check_base(base, "an old corpus")
    soft.check_base(base, "an old corpus")


def test_a_corpus_that_an_earlier_release_began_is_continued_as_it_calls_its_base_model(
    world: Path, tmp_path: Path
) -> None:
    config = make_config(world, people=str(world / "people"), output=str(tmp_path), dtype="bfloat16")
    maker = LoRAMaker(config)
    now, (old,) = maker.manifest(), list(maker.base._old_fingerprints())[:1]  # in bfloat16
    store, there = open_store(tmp_path), replace(now, base={**now.base, "fingerprint": old}, recogniser={})
    assert there.recipe_id != now.recipe_id
    open_corpus(store, there)
    assert open_corpus(store, maker.manifest(Manifest.find(store))) == there
    assert ShardMaker(config, InMemoryAttempts()).writer.manifest == there
    with pytest.raises(CorpusConflict, match=r"base.fingerprint"):
        open_corpus(store, now)


def test_the_shipped_synthesiser_belongs_to_the_shipped_models_and_start() -> None:
    from lora_diffusion.lora.shared_start import load_start

    identity, model = read_identity("tiny"), Synthesizer.from_pretrained("tiny")
    assert model.identity == identity
    assert asdict(identity)["recogniser"] == recogniser_id("tiny")
    model.check_base(base_model())
    start_N = load_start("tiny-start", model.layout, base_model())
    import hashlib

    assert identity.start == hashlib.sha256(start_N.numpy().tobytes()).hexdigest()[:16]


def test_a_folder_of_this_machine_does_not_show_in_files_that_are_given_away() -> None:
    base = ModelId("s3://my-bucket/models/sd15", "1")
    metadata = Identity(base, ModelId("/home/ada/faces/buffalo_l", "2"), "layout", "", "3").metadata()
    assert metadata == {
        "base_model": "sd15", "base_fingerprint": "1", "recogniser": "buffalo_l", "recogniser_fingerprint": "2", "recipe_id": "3",
    }  # fmt: skip
    assert Identity(ModelId("owner/model")).metadata() == {"base_model": "owner/model"}
    assert not re.search("ada|bucket", json.dumps(metadata))


def test_a_machine_with_other_recogniser_files_embeds_nobody_for_a_corpus(world: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(BUNDLED["tiny"], tmp_path / "models" / "buffalo_l")
    config = CorpusConfig(
        people=str(world / "people"), output=str(tmp_path / "corpus"), embedder=EmbedderConfig(str(copy))
    )
    recipe = {**RECIPE, **config.recipe(folder_fingerprint(config.embedder))}
    made = Manifest(LAYOUT.to_dict(), BASE, recipe)
    PersonEmbedder(config, 64).check(made)
    (copy / "rec.onnx").write_bytes((BUNDLED["tiny-b"] / "rec.onnx").read_bytes())
    with pytest.raises(
        ValueError, match=r"known\.npz was measured with another recogniser than .*rec\.onnx: delete it"
    ):
        PersonEmbedder(config, 64)
    (copy / "known.npz").unlink()
    with pytest.raises(Mismatch, match=rf"the models in {copy} \(\w+\) differ from .*is made with.*put the same files"):
        PersonEmbedder(config, 64).check(made)
