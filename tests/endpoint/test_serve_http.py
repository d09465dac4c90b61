"""HTTP as clients speak it: methods, paths, bodies and files in every form that they come in."""

from __future__ import annotations

import base64
import gzip
import io
import json
import textwrap
import zlib
from typing import Any

import httpx
import pytest
from serve_client import ADA, BOB, FAST, PROMPT, Client, problem, variant
from starlette.requests import Request

from lora_diffusion.endpoint.answers import wanted
from lora_diffusion.endpoint.problems import ApiError
from lora_diffusion.endpoint.studio import Studio

PNG = ADA.read_bytes()
PLAIN = base64.b64encode(PNG).decode()
LORA = f"/v1/loras/{'0' * 32}"
JSON = {"content-type": "application/json"}
GETS = ["/", "/index.html", "/style.css", "/healthz", "/readyz", "/v1/model", "/docs", "/openapi.json", "/metrics"]
POSTS = ["embeddings", "latents", "loras", "images", "personalize", "edits", "interpolations"]


@pytest.mark.parametrize("path", [*GETS, LORA, "/nothing", "/v1/loras/x"])
def test_head_is_get_without_the_body(api: Client, path: str) -> None:
    head, get = api("HEAD", path), api("GET", path)
    assert head.status_code == get.status_code
    assert head.content == b""
    moving = {"content-length"} if path == "/metrics" else set()
    assert {k: v for k, v in head.headers.items() if k not in {"x-request-id", *moving}} == {
        k: v for k, v in get.headers.items() if k not in {"x-request-id", *moving}
    } or "request_id" in get.text


def test_head_sends_no_body_to_a_server_that_would_pass_it_on(api: Client) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "HEAD", "path": "/healthz", "headers": [], "query_string": b"", "root_path": ""}
    api.loop.run_until_complete(api.app({**scope, "http_version": "1.1", "scheme": "http"}, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 200
    assert b"".join(message.get("body", b"") for message in sent) == b""


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        *((f"/v1/{name}", "POST") for name in POSTS if name != "loras"),
        ("/v1/loras", "POST"),
        ("/v1/loras/", "POST"),
        (LORA, "GET, HEAD, DELETE"),
        ("/v1/model", "GET, HEAD"),
        ("/healthz", "GET, HEAD"),
        ("/", "GET, HEAD"),
        ("/docs", "GET, HEAD"),
        ("/openapi.json", "GET, HEAD"),
        ("/metrics", "GET, HEAD"),
    ],
)
def test_another_method_is_told_which_there_are(api: Client, path: str, allowed: str) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"} - set(allowed.split(", ")):
        answer = api(method, path)
        told = problem(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == allowed
        assert told["detail"] == f"This path takes {allowed}; {method} is none of them."
    if "HEAD" not in allowed:
        assert (api("HEAD", path).status_code, api("HEAD", path).headers["allow"]) == (405, allowed)


@pytest.mark.parametrize("path", ["/healthz/", "/v1/model/", "/docs/"])
def test_slash_at_the_end_of_a_path_counts_for_nothing(api: Client, path: str) -> None:
    assert api("GET", path).content == api("GET", path.rstrip("/")).content


def test_post_to_a_path_with_a_slash_is_answered(api: Client) -> None:
    assert api.form("/v1/loras/", **{"latent_inference_steps": 3}).status_code == 201
    problem(api("GET", f"{LORA}/"), 404, "unknown_lora")
    for path in ("/v1/loras//", "//v1/loras", "/v1//loras", "/V1/loras", "/v1"):
        problem(api("POST", path, json={}), 404, "not_found")


def test_behind_a_prefix_the_urls_of_an_answer_work(studio: Studio) -> None:
    client = variant(studio, root_path="/lora")
    lora = client.form("/lora/v1/loras", latent_inference_steps=3).json()["loras"][0]
    assert lora["url"].startswith("/lora/v1/loras/")
    for url in (lora["url"], lora["files"]["vector"]):
        assert client("GET", url).status_code == 200
    page = client("GET", "/lora")  # without the slash the page's links would lead elsewhere
    assert (page.status_code, page.headers["location"]) == (307, "/lora/")
    assert client("GET", "/lora/").text.startswith("<!doctype html>")
    assert client("GET", "/lora/openapi.json").json()["servers"] == [{"url": "/lora"}]


# -- bodies -----------------------------------------------------------------------------------------------------------


def body(**fields: Any) -> bytes:
    return json.dumps({"latent_inference_steps": 3, **fields}).encode()


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "GZIP"])
def test_gzip_is_read(api: Client, coding: str) -> None:
    headers = {**JSON, "content-encoding": coding}
    assert api("POST", "/v1/latents", content=gzip.compress(body(photos=[PLAIN])), headers=headers).status_code == 200
    form = httpx.Request("POST", "http://x", files={"photo": ("a.png", PNG)})
    headers = {"content-type": form.headers["content-type"], "content-encoding": coding}
    assert api("POST", "/v1/latents", content=gzip.compress(form.read()), headers=headers).status_code == 200


@pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "gzip, gzip", "compress", "x"])
@pytest.mark.parametrize("name", POSTS)
def test_other_codings_are_refused_with_those_that_are_read(api: Client, coding: str, name: str) -> None:
    headers = {**JSON, "content-encoding": coding}
    answer = api("POST", f"/v1/{name}", content=zlib.compress(body()), headers=headers)
    problem(answer, 415, "unsupported_media_type")
    assert answer.headers["accept-encoding"] == "gzip, identity"


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (gzip.compress(b"0" * 3_000_000, mtime=0), 413, "body_too_large"),  # the server takes two megabytes
        (gzip.compress(body(), mtime=0)[:-9], 400, "malformed_body"),
        (body(), 400, "malformed_body"),
        (b"", 400, "malformed_body"),
    ],
)
def test_gzip_that_is_none_or_too_much_is_refused(api: Client, data: bytes, status: int, reason: str) -> None:
    problem(api("POST", "/v1/latents", content=data, headers={**JSON, "content-encoding": "gzip"}), status, reason)


SPELLINGS = {
    "plain": PLAIN,
    "data URL": f"data:image/png;base64,{PLAIN}",
    "data URL with a parameter": f"data:image/png;name=a.png;base64,{PLAIN}",
    "data URL without a type": f"data:;base64,{PLAIN}",
    "URL-safe": base64.urlsafe_b64encode(PNG).decode(),
    "URL-safe without padding": base64.urlsafe_b64encode(PNG).decode().rstrip("="),
    "without padding": PLAIN.rstrip("="),
    "wrapped": "\n".join(textwrap.wrap(PLAIN, 76)),
    "wrapped as mail does": "\r\n".join(textwrap.wrap(PLAIN, 64)) + "\r\n",
    "indented data URL": f" data:image/png;base64,\n  {PLAIN} ",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_base64_is_read_however_it_is_written(api: Client, spelling: str) -> None:
    text = SPELLINGS[spelling]
    found = api.json("/v1/embeddings", photos=[text])
    assert found.json() == api.form("/v1/embeddings").json()
    form = api("POST", "/v1/embeddings", files={"photo": (None, text)})  # as text in a form, too
    assert form.json() == found.json()


@pytest.mark.parametrize("name", ["embeddings", "latents", "loras", "images", "personalize"])
def test_every_route_reads_photos_alike(api: Client, name: str) -> None:
    more = {"prompt": PROMPT, **FAST} if name in ("images", "personalize") else {}
    for text in (SPELLINGS["data URL"], SPELLINGS["URL-safe without padding"], SPELLINGS["wrapped"]):
        assert api.json(f"/v1/{name}", photos=[text], **more).status_code in (200, 201)
    for text in ("!!", "data:image/png,%89PNG", "data:;base64,!", "a", "\u00e9", f"{PLAIN}!"):
        told = problem(api.json(f"/v1/{name}", photos=[text], **more), 422, "invalid_request")
        assert told["detail"] == "photos.0: is not valid base64"


def test_a_lora_file_is_read_as_photos_are(api: Client) -> None:
    file = api.form("/v1/loras", seed=1, format="kohya", latent_inference_steps=3).content
    text = base64.urlsafe_b64encode(file).decode()
    plain = api("POST", "/v1/loras", files={"lora_file": ("x", file)}).json()["loras"][0]["id"]
    for uploaded in (
        api.json("/v1/loras", lora_file=f"data:application/octet-stream;base64,{text}"),
        api("POST", "/v1/loras", files={"lora_file": (None, text)}),
    ):
        assert uploaded.json()["loras"][0]["id"] == plain


def part(name: str, content: bytes, *headers: str) -> bytes:
    lines = [b"--x", f'Content-Disposition: form-data; name="{name}"'.encode(), *(h.encode() for h in headers)]
    return b"\r\n".join([*lines, b"", content, b""])


STEPS = part("latent_inference_steps", b"3")
END = b"--x--\r\n"
FORMS = {
    "raw photo without a file name": part("photo", PNG) + STEPS + END,
    "name of PHP": part("photo[]", PNG) + STEPS + END,
    "text with a type": part("photo", PNG) + part("latent_inference_steps", b"3", "Content-Type: text/plain") + END,
    "epilogue": part("photo", PNG) + END + b"bye",
    "file name in another alphabet": part("photo", PNG).replace(
        b'"photo"', 'photo; filename="\u00e4\u4f60.png"'.encode()
    )
    + END,
    "extended file name": part("photo", PNG).replace(b'"photo"', b"photo; filename*=UTF-8''a%20b.png") + END,
    "long header": part("photo", PNG, "X-Long: " + "a" * 2000) + END,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("boundary", ["x", '"x"'])
def test_odd_forms_are_read(api: Client, form: str, boundary: str) -> None:
    headers = {"content-type": f"Multipart/Form-Data; Boundary={boundary}"}
    answer = api("POST", "/v1/latents", content=FORMS[form], headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (part("prompt", b"a") + part("prompt", b"b") + END, 400),
        (part("photo", PNG), 422),  # the end is missing: so is the part
        (b"", 422),
        (END, 422),
        (part("embedding", b"[1,") + END, 400),
        (part("embedding", b"\xff\xfe") + END, 400),
        (part("edits", b"", 'Content-Disposition: form-data; name="edits"; filename="e"') + END, 400),
        (b"--y\r\n\r\n--y--", 400),
        (b"".join(part(f"f{i}", b"") for i in range(70)) + END, 400),
        (b"".join(part("photo", b"x").replace(b'"photo"', b'"photo"; filename="x"') for _ in range(20)) + END, 400),
    ],
)
def test_broken_forms_are_refused(api: Client, content: bytes, status: int) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = api("POST", "/v1/images", content=content, headers=headers)
    problem(answer, status, {400: "malformed_body", 422: "invalid_request"}[status])


@pytest.mark.parametrize("name", POSTS)
@pytest.mark.parametrize(
    "media_type",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/xml",
        "image/png",
        "foo",
        ";",
        "application/json; charset=latin-1",
        "application/json; charset=utf-16",
        "multipart/form-data; boundary=x; charset=unicode_escape",
    ],
)
def test_other_types_and_charsets_are_refused(api: Client, name: str, media_type: str) -> None:
    problem(
        api("POST", f"/v1/{name}", content=b"{}", headers={"content-type": media_type}), 415, "unsupported_media_type"
    )


@pytest.mark.parametrize(
    "media_type", ["APPLICATION/JSON", "application/json;charset=UTF-8", 'application/json; charset="utf-8"; x=y']
)
def test_json_is_known_however_it_is_called(api: Client, media_type: str) -> None:
    content = body(embedding=[1.0] * 512)
    assert api("POST", "/v1/latents", content=content, headers={"content-type": media_type}).status_code == 200
    with_mark = b"\xef\xbb\xbf" + content
    assert api("POST", "/v1/latents", content=with_mark, headers=JSON).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", f"{LORA}?fromat=peft"), ("POST", "/v1/loras?seed=3"), ("GET", "/v1/model?x"), ("DELETE", f"{LORA}?a=b")],
)
def test_a_parameter_of_the_url_that_means_nothing_is_refused(api: Client, method: str, path: str) -> None:
    content = {"content": body(embedding=[1.0] * 512), "headers": JSON} if method == "POST" else {}
    told = problem(api(method, path, **content), 422, "invalid_request")
    assert "parameter in the URL" in told["detail"]
    assert api("GET", "/?utm_source=x").status_code == 200  # the page is let alone


def test_request_id_comes_once(api: Client) -> None:
    for path in ("/healthz", "/nothing", LORA):
        answer = api("GET", path, headers={"X-Request-ID": "abc"})
        assert answer.headers.get_list("x-request-id") == ["abc"]


@pytest.mark.parametrize(
    ("accept", "answer"),
    [
        ("image/png;q=0.1, application/json", "json"),
        ("application/json;q=0.2, image/webp ; q=0.9", "image"),
        ("text/html, application/xhtml+xml, */*;q=0.8", "json"),
        ("application/json;q=0, text/event-stream", "events"),
        ("IMAGE/PNG", "image"),
        ("", "json"),
    ],
)
def test_what_is_liked_best_is_answered(accept: str, answer: str) -> None:
    assert wanted(Request({"type": "http", "headers": [(b"accept", accept.encode())]})) == answer


@pytest.mark.parametrize("accept", ["application/json;q=0", "image/gif", "text/html"])
def test_what_we_do_not_have_is_refused(accept: str) -> None:
    with pytest.raises(ApiError, match="Accept application/json"):
        wanted(Request({"type": "http", "headers": [(b"accept", accept.encode())]}))


# -- what the messages say -------------------------------------------------------------------------------------------------


def two_faces() -> bytes:
    from PIL import Image

    a, b = (Image.open(path).convert("RGB") for path in (ADA, BOB))
    both = Image.new("RGB", (a.width + b.width, a.height))
    both.paste(a, (0, 0))
    both.paste(b, (a.width, 0))
    buffer = io.BytesIO()
    both.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Ada & me.jpg", "Ada & me.jpg"),
        ("/home/ada/me.jpg", "me.jpg"),
        ("C:\\fakepath\\me.jpg", "me.jpg"),
        ("\u4f60\u597d.jpg", "\u4f60\u597d.jpg"),
        ("a" * 200 + ".jpg", "a" * 80),
        ("blob", "The photo"),
        ("", "The photo"),
        ("..", "The photo"),
    ],
)
def test_a_photo_is_called_as_its_sender_named_it(api: Client, name: str, shown: str) -> None:
    answer = api("POST", "/v1/loras", files={"photo": (name or None, two_faces())})
    told = problem(answer, 422, "several_faces")
    assert told["detail"] == f"{shown} shows 2 faces. Crop it to one person, or ask for the largest: faces=largest."


def test_of_several_photos_the_bad_one_is_named(api: Client) -> None:
    files = [("photo", ("ada.png", PNG)), ("photo", ("notes.txt", b"hello"))]
    for path in ("/v1/embeddings", "/v1/loras"):
        told = problem(api("POST", path, files=files), 422, "not_an_image")
        assert told["detail"].startswith("notes.txt: ")
    told = problem(api.json("/v1/loras", photos=[PLAIN, base64.b64encode(b"hello").decode()]), 422, "not_an_image")
    assert told["detail"].startswith("Photo 2: ")


@pytest.mark.parametrize("name", ["embeddings", "loras"])
def test_an_empty_file_is_told_as_such(api: Client, name: str) -> None:
    told = problem(api("POST", f"/v1/{name}", files={"photo": ("ada.jpg", b"")}), 422, "empty_file")
    assert told["detail"].startswith("ada.jpg: The file has 0 bytes.")
    problem(api.json(f"/v1/{name}", photos=[""]), 422, "empty_file")


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"prompt": ""}, "prompt: is blank: say what to draw, for example `a photo of sks person`"),
        ({"prompt": " \n\t"}, "prompt: is blank: say what to draw, for example `a photo of sks person`"),
        ({}, "prompt: is missing"),
        (
            {"prompt": "a", "negative_prompt": "b" * 1204},
            "negative_prompt has 1,204 characters; this server allows at most 1,000.",
        ),
        ({"prompt": "a" * 1204}, "prompt has 1,204 characters; this server allows at most 1,000."),
        ({"prompt": "a", "num_images": 5}, "num_images is 5; this server allows at most 4."),
        (
            {"prompt": "a", "lora": "x"},
            "lora: is no id: an id has 32 hexadecimal digits, as in the answer that gave it",
        ),
        ({"prompt": "a", "promt": "b"}, "promt: there is no such field here; did you mean prompt?"),
    ],
)
def test_what_is_wrong_is_said_in_words(api: Client, fields: dict[str, Any], detail: str) -> None:
    source = {} if "lora" in fields else {"embedding": [1.0] * 512}
    assert problem(api.json("/v1/images", **source, **fields), 422, "invalid_request")["detail"] == detail


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("lora_id", ["x", "0" * 31, "0" * 33, "G" * 32, "A" * 32])
def test_an_id_that_is_none_is_told_what_one_looks_like(api: Client, method: str, lora_id: str) -> None:
    told = problem(api(method, f"/v1/loras/{lora_id}"), 422, "invalid_request")
    assert told["detail"] == "lora_id: is no id: an id has 32 hexadecimal digits, as in the answer that gave it"


def test_without_javascript_the_page_says_so_before_anything_else(api: Client) -> None:
    page = api("GET", "/").text
    assert page.partition("<body>")[2].lstrip().startswith('<noscript><p class="alert">')
    assert "v1/loras" in page.partition("<body>")[2].partition("</noscript>")[0]
