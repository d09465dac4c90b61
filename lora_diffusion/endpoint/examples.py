"""One request and one answer of each kind, for the OpenAPI description. Embeddings and latents are cut to four numbers."""

from __future__ import annotations

from typing import Any

PROMPT = "a photo of sks person, smiling, forest background"
PHOTO = "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgICAgMCAgIDAwMDBA=="
LATENT = {"values": [0.12, -0.4, 1.03, 0.08], "model": "3f2a9c04d1e85b76"}
ID, OTHER = "5b0c6b1d8c0f4a5e9a7d3c2b1f0e9d8c", "0e1f2a3b4c5d6e7f8091a2b3c4d5e6f7"
LORA: dict[str, Any] = {
    "id": ID,
    "seed": 7,
    "position": None,
    "similarity": 0.61,
    "nearest": {"similarity": 0.42},
    "left_out": [{"photo": "ben.jpg", "cosine": 0.04}],
    "expires_in": 3600.0,
    "deletion_token": "9f1c0d7b2e4a48536a7b8c9d0e1f2a3b",
    "url": f"/v1/loras/{ID}",
    "files": {name: f"/v1/loras/{ID}?format={name}" for name in ("diffusers", "peft", "kohya", "vector", "latent")},
}
IMAGE = {"index": 0, "seed": 11, "media_type": "image/png", "data": "iVBORw0KGgo=", "similarity": 0.61}
FACE = {
    "box": [41.0, 30.5, 118.2, 139.0],
    "keypoints": [[61.0, 74.1], [97.9, 73.2], [80.0, 96.4], [64.8, 115.0], [95.1, 114.4]],
    "score": 0.93,
    "embedding": [0.03, -0.11, 0.07, 0.02],
}

EXAMPLES: dict[str, Any] = {
    "EmbeddingsRequest": {"photos": [PHOTO]},
    "LatentsRequest": {"photos": [PHOTO], "num_samples": 2, "seed": 7},
    "LorasRequest": {"photos": [PHOTO], "seed": 7, "score": True},
    "ImagesRequest": {"lora": ID, "prompt": PROMPT, "num_images": 2, "image_seed": 11},
    "PersonalizeRequest": {"photos": [PHOTO], "prompt": PROMPT, "num_images": 4, "format": "diffusers"},
    "LikenessRequest": {"photos": [PHOTO, PHOTO], "prompt": PROMPT, "num_images": 4},
    "EditsRequest": {"lora": ID, "edits": {"older": 2.0, "glasses": -1.0}},
    "InterpolationsRequest": {"a": {"lora": ID}, "b": {"lora": OTHER}, "num": 5},
    "EmbeddingsResponse": {"photos": [{"width": 160, "height": 180, "faces": [FACE]}]},
    "LatentsResponse": {"latents": [{"latent": LATENT, "seed": 7}], "nearest": {"similarity": 0.42}, "left_out": []},
    "LoRA": LORA,
    "LorasResponse": {"loras": [LORA]},
    "ImagesResponse": {"lora": LORA, "images": [IMAGE]},
    "PersonalizeResponse": {
        "lora": LORA,
        "images": [IMAGE],
        "file": {"name": "lora.safetensors", "media_type": "application/octet-stream", "data": "AAAA"},
    },
    "LikenessResponse": {"base": 0.05, "nearest": 0.44, "lora": 0.61, "photos": 0.79, "left_out": []},
    "ModelResponse": {
        "base": {"name": "tiny-sd", "fingerprint": "12fd", "image_size": 64, "words": ["beach", "photo", "smiling"]},
        "layout": {"layout_id": "a1b2", "rank": 1, "alpha": 1.0, "size": 199680, "target_modules": ["to_q", "to_v"]},
        "synthesizer": {
            "id": LATENT["model"],
            "latent_size": 512,
            "embedding_size": 512,
            "attributes": ["glasses", "long hair", "older"],
        },
        "recogniser": "tiny",
        "people": "rendered",
        "identity": {"base": {"name": "tiny-sd", "fingerprint": "12fd"}, "layout_id": "a1b2"},
        "formats": list(LORA["files"]),
        "limits": {"max_images": 8, "max_photos": 8},
        "defaults": {"num_inference_steps": 20, "guidance_scale": 1.25},
        "versions": {"lora-diffusion": "0.1.0", "torch": "2.13.0"},
        "licence": "Apache-2.0",
    },
    "Status": {"status": "ok"},
}
EVENTS = """\
event: progress
data: {"done": 5, "total": 20}

event: done
data: {"lora": {...}, "images": [...]}

"""
