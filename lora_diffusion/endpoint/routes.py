"""The routes of /v1: each turns a request into calls of the studio, and the outcome into an answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar, get_type_hints

import numpy as np
from fastapi import FastAPI, Path, Request, Response

from lora_diffusion.endpoint import answers, schemas
from lora_diffusion.endpoint.access import DELETION_TOKEN
from lora_diffusion.endpoint.checks import check_limits, check_recogniser, unit_embedding
from lora_diffusion.endpoint.docs import LORA_FILES, PICTURES, WITH_PHOTOS, operation
from lora_diffusion.endpoint.problems import PHOTO_REASONS, ApiError
from lora_diffusion.endpoint.routing import Endpoint
from lora_diffusion.endpoint.studio import Made, Person, Sampled, Studio, mean_cosine, new_seed, together
from lora_diffusion.faces.embedder import BUNDLED
from lora_diffusion.serving.messages import FILE_NAMES, Code, Decoded, DrawTask, Floats, LatentTask, Owner

# the API says it of latents where pictures have the same setting
T = TypeVar("T")
LATENT_NAMES = {"guidance_scale": "latent_guidance_scale", "num_inference_steps": "latent_inference_steps"}


# reasons of refusals, beside those of every route (docs.py)
SAMPLED = (*WITH_PHOTOS, "diverged")
CODED = ("unknown_lora", "stale_latent", "diverged", "store_unavailable")
CHANGED = (*CODED, "unknown_attribute")
MADE = (*SAMPLED, "bad_lora", "stale_latent", "store_unavailable")
DELETED = ("unknown_lora", "not_yours", "store_unavailable")
DRAWN = (*MADE, "unknown_lora", "not_acceptable")


def route(method: str, path: str, *description: Any, **options: Any) -> Callable[[Endpoint], Endpoint]:
    """Declares a method of `Routes` as an endpoint. description, options: of `docs.operation`."""

    def declare(endpoint: Endpoint) -> Endpoint:
        endpoint.declared = (method, path, description, options)  # type: ignore[attr-defined]
        return endpoint

    return declare


class Routes:
    """The endpoints of /v1; all of them work on `studio`."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.config = studio.config
        self._about: dict[str, Any] = {}

    def add_to(self, app: FastAPI) -> None:
        for name, function in vars(Routes).items():
            if declared := getattr(function, "declared", None):
                method, path, description, options = declared
                endpoint, request = getattr(self, name), get_type_hints(function).get("asked")
                endpoint = self._limited(endpoint) if request else endpoint
                app.api_route(path, methods=[method], **operation(*description, **options, request=request))(endpoint)

    def _limited(self, endpoint: Callable[..., Any]) -> Callable[..., Any]:
        """The endpoint, for requests within the limits of this server."""

        @wraps(endpoint)
        async def within(asked: schemas.Request, request: Request) -> Any:
            check_limits(asked, self.config.limits)
            return await endpoint(asked, request)

        return within

    # -- one step of the way each ---------------------------------------------------------------------------------------

    @route("POST", "/v1/embeddings", "people", "Photos to faces", schemas.EmbeddingsResponse, PHOTO_REASONS)
    async def embeddings(self, asked: schemas.EmbeddingsRequest, request: Request) -> schemas.EmbeddingsResponse:
        """The faces of each photo, with their embeddings."""
        found = await self.studio.faces(asked.photos, deadline(request))
        return schemas.EmbeddingsResponse(
            photos=[
                schemas.PhotoFaces(
                    width=photo.width,
                    height=photo.height,
                    faces=[
                        schemas.Face(
                            box=face.box.tolist(),
                            keypoints=face.keypoints.tolist(),
                            score=face.score,
                            embedding=face.embedding_C.tolist(),
                        )
                        for face in photo.faces
                    ],
                    reason=photo.doubt.reason if photo.doubt else None,
                    detail=f"The photo {photo.doubt.sentence}" if photo.doubt else None,
                )
                for photo in found
            ]
        )

    @route("POST", "/v1/latents", "people", "A person to latents", schemas.LatentsResponse, SAMPLED)
    async def latents(self, asked: schemas.LatentsRequest, request: Request) -> schemas.LatentsResponse:
        """Codes of a person: small, and enough to make the LoRA later."""
        samples = await self._samples(asked, request, asked.num_samples)
        return schemas.LatentsResponse(
            latents=[
                schemas.SampledLatent(
                    latent=schemas.Latent(values=s.code.values_Z.tolist(), model=s.code.model_id), seed=s.seed or 0
                )
                for s in samples
            ],
            nearest=answers.nearest(Made(Decoded(""), samples[0])),
            left_out=answers.left_out(samples[0].left_out),
        )

    @route("POST", "/v1/loras", "LoRAs", "A person to LoRAs", schemas.LorasResponse, MADE, status=201, files=LORA_FILES)
    async def loras(self, asked: schemas.LorasRequest, request: Request) -> Any:
        """LoRAs of a person. With `format`, the file itself."""
        if asked.format and asked.num_samples > 1:
            raise ApiError(
                "invalid_request",
                "format answers with one file: ask for one sample, or leave format out and fetch each file by its url.",
            )
        if asked.score and (asked.latent or asked.lora_file):
            raise ApiError("invalid_request", "score compares with photos or an embedding: give one of them.")
        made = await self._make(asked, request, asked.num_samples, asked.format)
        scores: list[float | None] = [None] * len(made)
        if asked.score:
            async with self._answered(made, request):
                scores = await together(self._score(m, deadline(request)) for m in made)
        if asked.format:
            return answers.file(made[0], asked.format, scores[0])
        return schemas.LorasResponse(
            loras=[answers.lora(m, self.config, root_of(request), score) for m, score in zip(made, scores, strict=True)]
        )

    @route("POST", "/v1/images", "pictures", "Pictures of a person", schemas.ImagesResponse, DRAWN, files=PICTURES)
    async def images(self, asked: schemas.ImagesRequest, request: Request) -> Any:
        """Pictures of a person."""
        return await self._draw(asked, request, None)

    @route(
        "POST", "/v1/personalize", "pictures", "Photos to pictures", schemas.PersonalizeResponse, DRAWN, files=PICTURES
    )
    async def personalize(self, asked: schemas.PersonalizeRequest, request: Request) -> Any:
        """LoRA and scored pictures in one go."""
        return await self._draw(asked, request, asked.format)

    @route("POST", "/v1/likeness", "pictures", "How like the person", schemas.LikenessResponse, SAMPLED)
    async def likeness(self, asked: schemas.LikenessRequest, request: Request) -> schemas.LikenessResponse:
        """Base model, nearest LoRA of the training, the person's own LoRA and own photos, on one scale."""
        photos: float | None = None
        left_out: list[schemas.LeftOut] = []
        if asked.photos:
            person = await self.studio.person(asked.photos, asked.faces, deadline(request))
            photos, left_out = mean_cosine(person.embeddings), answers.left_out(person.left_out)
            asked = asked.model_copy(update={"embedding": person.embedding_C.tolist()})
        (sampled,) = await self._samples(asked, request, 1)
        task = replace(self._task(asked, "", 1.0), reference_C=sampled.embedding_C)
        marks = await self.studio.landmarks(task, sampled, self._deviation(asked), deadline(request))
        return schemas.LikenessResponse(**marks, photos=photos, left_out=left_out)

    @route("POST", "/v1/edits", "LoRAs", "The LoRA of a changed person", schemas.LorasResponse, CHANGED, status=201)
    async def edits(self, asked: schemas.EditsRequest, request: Request) -> schemas.LorasResponse:
        """The LoRA of a changed person."""
        code = await self.studio.denoiser.edit(await self._code(asked, request), asked.edits)
        made = await self.studio.decode([Sampled(code)], self._deviation(asked), deadline(request), owner(request))
        return schemas.LorasResponse(loras=[answers.lora(made[0], self.config, root_of(request))])

    @route("POST", "/v1/interpolations", "LoRAs", "LoRAs between two people", schemas.LorasResponse, CODED, status=201)
    async def interpolations(self, asked: schemas.InterpolationsRequest, request: Request) -> schemas.LorasResponse:
        """LoRAs on the way from one person to another."""
        positions = asked.positions or np.linspace(0, 1, asked.num or 2).tolist()
        a, b = await together([self._code(asked.a, request), self._code(asked.b, request)])
        codes = await self.studio.denoiser.interpolate(a, b, positions)
        samples = [Sampled(code) for code in codes]
        made = await self.studio.decode(samples, self._deviation(asked), deadline(request), owner(request))
        return schemas.LorasResponse(
            loras=[
                answers.lora(m, self.config, root_of(request), position=at)
                for m, at in zip(made, positions, strict=True)
            ]
        )

    # -- LoRAs by their id ----------------------------------------------------------------------------------------------

    @route("GET", "/v1/loras/{lora_id}", "LoRAs", "A LoRA, or its file", schemas.LoRA, CODED, files=LORA_FILES)
    async def lora(
        self, request: Request, lora_id: str = Path(pattern=schemas.LORA_ID), format: schemas.FileFormat | None = None
    ) -> Any:
        """What is known of a LoRA, or with `format` its file."""
        place = owner(request).place(lora_id)
        if format is None:
            return answers.lora(await self._found(lora_id, request), self.config, root_of(request))
        return answers.file(
            Made(Decoded(lora_id, await self.studio.decoder.file(place, format, deadline(request)))), format
        )

    @route("DELETE", "/v1/loras/{lora_id}", "LoRAs", "Forget a LoRA", None, DELETED, status=204)
    async def delete_lora(self, request: Request, lora_id: str = Path(pattern=schemas.LORA_ID)) -> Response:
        """Forget a LoRA now."""
        if not await self.studio.library.delete(owner(request).place(lora_id), owner(request).token):
            raise ApiError("unknown_lora", "There is no LoRA of this id here (any more): nothing is left to delete.")
        return Response(status_code=204)

    @route("GET", "/v1/model", "server", "What is served here", schemas.ModelResponse)
    async def model(self) -> schemas.ModelResponse:
        """What this server serves, and what it allows."""
        about, base = await together([self.studio.denoiser.describe(), self.studio.renderer.describe()])
        limits, sampling = self.config.limits, self.config.sampling
        defaults = {name: getattr(sampling, name) for name in sampling.__dataclass_fields__}
        for name, recommended in about["synthesizer"]["latent_sampling"].items():
            ours = LATENT_NAMES.get(name, name)
            defaults[ours] = recommended if defaults[ours] is None else defaults[ours]
        return schemas.ModelResponse(
            base=base,
            identity=about["identity"],
            layout=about["layout"],
            synthesizer=about["synthesizer"],
            recogniser=self.config.embedder.get("model") or about["identity"]["recogniser"]["name"],
            people="rendered" if about["identity"]["recogniser"]["name"] in BUNDLED else "photographed",
            formats=list(FILE_NAMES),
            limits={name: getattr(limits, name) for name in limits.__dataclass_fields__},
            defaults=defaults,
            versions=about["versions"],
            licence=self.config.licence,
        )

    # -- what they share ------------------------------------------------------------------------------------------------

    async def _samples(self, asked: schemas.Sampling, request: Request, count: int) -> list[Sampled]:
        """Codes of the person in the request's photos, embedding or latent."""
        if isinstance(asked, schemas.AnySource) and asked.latent is not None:
            return [Sampled(_code(asked.latent))]
        if isinstance(asked, schemas.FaceSource) and asked.embedding is not None:
            check_recogniser(asked.recogniser, (await self._known())["identity"]["recogniser"])
            person = Person(await self._embedding(asked.embedding))
        else:
            person = await self.studio.person(asked.photos or [], asked.faces, deadline(request))
        sampling = self.config.sampling
        first = new_seed() if asked.seed is None else asked.seed
        task = LatentTask(
            person.embedding_C,
            first,
            _given(asked.latent_guidance_scale, sampling.latent_guidance_scale),
            _given(asked.latent_inference_steps, sampling.latent_inference_steps),
            _given(asked.temperature, sampling.temperature),
        )
        seeds = [(first + i) % (schemas.MAX_SEED + 1) for i in range(count)]
        sampled = await self.studio.sample([replace(task, seed=seed) for seed in seeds], deadline(request))
        return [replace(one, left_out=person.left_out) for one in sampled]

    async def _known(self) -> dict[str, Any]:
        self._about = self._about or await self.studio.denoiser.describe()  # a reload keeps the recogniser
        return self._about

    async def _embedding(self, values: list[float], name: str = "embedding") -> Floats:
        return unit_embedding(values, (await self._known())["synthesizer"]["embedding_size"], name)

    async def _make(
        self, asked: schemas.Sampling, request: Request, count: int, format: str | None = None
    ) -> list[Made]:
        """The LoRAs of a request, whatever it gives to make them of."""
        if isinstance(asked, schemas.AnySource) and count > 1 and (asked.latent or asked.lora_file):
            raise ApiError(
                "invalid_request", "num_samples draws from photos or an embedding; a latent or a file is one LoRA."
            )
        if isinstance(asked, schemas.AnySource) and asked.lora_file is not None:
            decoded = await self.studio.decoder.accept(asked.lora_file.data, format, owner(request))
            return [Made(decoded, token=owner(request).token)]
        samples = await self._samples(asked, request, count)
        return await self.studio.decode(samples, self._deviation(asked), deadline(request), owner(request), format)

    async def _code(self, asked: schemas.LatentOrLoRA, request: Request) -> Code:
        if asked.latent is not None:
            return _code(asked.latent)
        assert asked.lora is not None
        record = await self.studio.library.get(owner(request).place(asked.lora))
        if record.code is None:
            raise ApiError("stale_latent", "This LoRA was uploaded: it has no latent to change. Make one from a photo.")
        return record.code

    async def _draw(
        self, asked: schemas.ImagesRequest | schemas.PersonalizeRequest, request: Request, format: str | None
    ) -> Any:
        how = answers.wanted(request)
        if how == "image" and asked.num_images > 1:
            raise ApiError(
                "not_acceptable", "An image/* answer holds one picture: accept application/json for several."
            )
        lora_id, reference_C = None, None
        if isinstance(asked, schemas.ImagesRequest):
            lora_id = asked.lora
            reference_C = None if asked.reference is None else await self._embedding(asked.reference, "reference")
        if lora_id:
            made = await self._found(lora_id, request)
        else:
            (made,) = await self._make(asked, request, 1, format)
        if reference_C is None and made.sampled is not None:
            reference_C = made.sampled.embedding_C
        task = replace(
            self._task(asked, owner(request).place(made.decoded.lora_id), asked.lora_scale),
            image_format=answers.image_format(request, asked),
            record=made.record,
            reference_C=reference_C,
        )
        pictures = answers.Pictures(self.studio, made, task, deadline(request), root_of(request), format)
        async with self._answered([] if lora_id else [made], request):
            return await pictures.answer(how)

    async def _found(self, lora_id: str, request: Request) -> Made:
        """A LoRA that is in the library already."""
        return Made(Decoded(lora_id), record=await self.studio.library.get(owner(request).place(lora_id)))

    @asynccontextmanager
    async def _answered(self, made: Sequence[Made], request: Request) -> AsyncIterator[None]:
        """Without an answer nobody is told the tokens that were drawn to delete these LoRAs: they are forgotten at once."""
        try:
            yield
        except BaseException:
            with suppress(Exception):
                if DELETION_TOKEN not in request.headers:
                    await together(self._forget(one, request) for one in made if one.token)
            raise

    async def _forget(self, made: Made, request: Request) -> None:
        await self.studio.library.delete(owner(request).place(made.decoded.lora_id), made.token)

    def _task(self, asked: schemas.DrawOptions, lora_id: str, lora_scale: float) -> DrawTask:
        first = new_seed() if asked.image_seed is None else asked.image_seed
        sampling = self.config.sampling
        return DrawTask(
            lora_id=lora_id,
            prompt=asked.prompt,
            negative_prompt=_given(asked.negative_prompt, sampling.negative_prompt),
            seeds=tuple((first + i) % (schemas.MAX_SEED + 1) for i in range(asked.num_images)),
            guidance_scale=_given(asked.guidance_scale, sampling.guidance_scale),
            num_inference_steps=_given(asked.num_inference_steps, sampling.num_inference_steps),
            lora_scale=lora_scale,
        )

    async def _score(self, made: Made, until: float) -> float:
        """Similarity of one picture, drawn with the server's prompt for scores."""
        assert made.sampled is not None
        asked = schemas.DrawOptions.model_validate({"prompt": self.config.sampling.score_prompt, "image_seed": 0})
        task = self._task(asked, made.decoded.lora_id, 1.0)
        task = replace(task, record=made.record, reference_C=made.sampled.embedding_C)
        return await self.studio.likeness(task, until)

    def _deviation(
        self, asked: schemas.Sampling | schemas.EditsRequest | schemas.InterpolationsRequest
    ) -> float | None:
        return _given(asked.deviation_scale, self.config.sampling.deviation_scale)


def deadline(request: Request) -> float:
    """When the caller stops waiting."""
    until: float = request.state.deadline
    return until


def owner(request: Request) -> Owner:
    """Whose the LoRAs of this request are."""
    known: Owner = request.state.owner
    return known


def root_of(request: Request) -> str:
    """What stands before the paths of this server: Serve's route_prefix, or where it is mounted."""
    return str(request.scope.get("root_path", "")).rstrip("/")


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _code(latent: schemas.Latent) -> Code:
    values = np.clip(np.asarray(latent.values, np.float64), -1e30, 1e30)  # within float32
    return Code(values.astype(np.float32), latent.model)
