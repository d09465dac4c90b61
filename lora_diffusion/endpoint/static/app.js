// The page: a photo becomes a person (one LoRA), the person is drawn, changed, and taken away as a file.

import { Problem, ask, fetchFile, form, listen, setUp } from "./api.js";
import { startBlend } from "./blend.js";
import { crop, prepare } from "./photos.js";
import { clear, fill, make, place } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const SUBJECT = "sks person";
const SLIDERS = 8;
const IDEAS = {
  "On a beach": "a photo of sks person, smiling, beach background",
  "In a forest": "a photo of sks person, neutral, soft daylight, forest background",
  "City at night": "a photo of sks person, slight smile, flash, night lights background",
  "Studio portrait": "a photo of sks person, neutral, studio light, dark studio background",
  "Laughing": "a photo of sks person, laughing, soft daylight, garden background",
  "Surprised": "a photo of sks person, surprised, yellow wall background",
};

let model; // GET /v1/model
let person; // {name, photo: Blob, url, base: LoRA of the photo, lora: the one shown, faces}
let drawing = new AbortController();
const strengths = {}; // attribute -> standard deviations, only those that are not 0

// -- a photo -----------------------------------------------------------------------------------------------------------

async function choose(file, name, faces = "one") {
  if (!file) return;
  if (file.type && !file.type.startsWith("image/")) {
    return tell(new Problem({ detail: `${file.name || "This"} is not a picture. Choose a photo (JPEG, PNG or WebP).` }));
  }
  calm();
  if (person) URL.revokeObjectURL(person.url);
  const photo = await prepare(file);
  person = { name: name ?? "Your person", photo, url: URL.createObjectURL(file), faces };
  for (const attribute of Object.keys(strengths)) delete strengths[attribute];
  showStudio();
  await draw();
}

function showStudio() {
  $("start").hidden = true;
  $("studio").hidden = $("again").hidden = false;
  $("photo").src = person.url;
  $("photo").alt = `The photo: ${person.name}`;
  $("name").textContent = person.name;
  $("likeness").hidden = true;
  for (const input of $("change").querySelectorAll("input")) setSlider(input, 0);
  blend.leave();
  ready(false);
  clear($("pictures"));
  window.scrollTo({ top: 0 });
  $("name").focus({ preventScroll: true });
}

function startAgain() {
  drawing.abort();
  blend.leave();
  calm();
  $("studio").hidden = $("again").hidden = true;
  $("start").hidden = false;
  $("file").value = "";
  clear($("pictures"));
  person = undefined;
  $("file").focus();
}

/** Several faces in the photo: let the person choose one, by its picture. */
async function chooseFace() {
  const { photo, name } = person;
  const { photos } = await ask("v1/embeddings", { body: form({ photo }) });
  const crops = await Promise.all(photos[0].faces.map((face) => crop(photo, face.box)));
  $("found").replaceChildren(
    ...crops.map((blob, i) => {
      const button = make("button", { type: "button" });
      button.append(make("img", { src: URL.createObjectURL(blob), alt: `Face ${i + 1} of ${crops.length}` }));
      button.addEventListener("click", () => ($("faces").close(), choose(blob, name, "largest")));
      const item = make("li");
      item.append(button);
      return item;
    }),
  );
  $("faces").showModal();
}

// -- drawing -----------------------------------------------------------------------------------------------------------

async function draw() {
  drawing.abort();
  drawing = new AbortController();
  const { signal } = drawing;
  const count = Number($("count").value);
  const places = Array.from({ length: count }, place);
  clear($("pictures"));
  $("pictures").append(...places);
  calm();
  progress(0);
  say(person.base ? "Drawing" : "Reading the face");
  try {
    const changed = Object.keys(strengths).length > 0;
    if (changed) person.lora = await changedLoRA(signal);
    const [path, source] = changed ? ["v1/images", { lora: person.lora.id }] : ["v1/personalize", photoSource()];
    const body = form({ ...source, ...imageOptions(), num_images: count });
    let drawn = 0;
    await listen(path, {
      body,
      signal,
      onWait: (seconds) => say(`The server is busy; asking again in ${Math.ceil(seconds)} s`),
      onEvent(event, data) {
        if (signal.aborted) return;
        if (event === "lora" && !changed) haveLoRA(data);
        if (event === "lora") say("Drawing");
        if (event === "progress") progress(data.done / data.total);
        if (event === "image") {
          fill(places[data.index], data, { alt: describe(data.seed), saveAs: `${person.name.toLowerCase().replaceAll(" ", "-")}-${data.seed}.${data.media_type.split("/")[1]}` });
          say(`${++drawn} of ${count} ${count === 1 ? "picture" : "pictures"} drawn`);
        }
        if (event === "done" && !changed) showLikeness(data.lora);
      },
    });
    say(count === 1 ? "Your picture is ready" : `Your ${count} pictures are ready`);
    if (changed) $("likeness").hidden = true;
    ready(true);
  } catch (error) {
    if (signal.aborted) return;
    for (const item of places) if (item.className === "waiting") item.remove();
    say("");
    tell(error);
  } finally {
    if (!signal.aborted) progress(null);
  }
}

function photoSource() {
  return { photo: person.photo, faces: person.faces, seed: Number($("variant").value) || 0 };
}

function imageOptions() {
  return {
    prompt: $("prompt").value.trim(),
    image_seed: Number($("seed").value) || 0,
    num_inference_steps: $("steps").value,
    guidance_scale: $("guidance").value,
    negative_prompt: $("negative").value.trim(),
  };
}

/** The LoRA of the person with the sliders' changes. If the server has forgotten the person, it is told again. */
async function changedLoRA(signal) {
  const change = async () => (await ask("v1/edits", { body: { lora: person.base.id, edits: { ...strengths } }, signal })).loras[0];
  try {
    return await change();
  } catch (error) {
    if (error.reason !== "unknown_lora") throw error;
    person.base = (await ask("v1/loras", { body: form(photoSource()), signal })).loras[0];
    return change();
  }
}

function haveLoRA(lora) {
  person.base = person.lora = lora;
  $("expires").textContent = `after ${duration(lora.expires_in)}`;
  ready(true);
}

function showLikeness({ similarity, nearest }) {
  $("likeness").hidden = similarity === null;
  if (similarity === null) return;
  const shown = Math.max(0, similarity).toFixed(2);
  $("likeness-number").textContent = shown;
  $("likeness-meter").setAttribute("aria-valuenow", shown);
  $("likeness-meter").firstElementChild.style.width = `${100 * shown}%`;
  const control = nearest ? ` Nearest person in training: ${nearest.similarity.toFixed(2)}.` : "";
  $("likeness-text").textContent = `Of the drawn faces to the photo’s: 0 is a stranger, 1 the same photo.${control}`;
}

function ready(whether) {
  for (const button of document.querySelectorAll("[data-format]")) button.disabled = !whether;
  $("forget").disabled = !whether;
  const changed = Object.keys(strengths).length > 0;
  $("reset").disabled = !changed;
  $("which").textContent = changed ? "This is the LoRA of the changed face." : "kohya is for WebUI and ComfyUI.";
}

// -- files -------------------------------------------------------------------------------------------------------------

async function download(lora, format, name) {
  const { blob } = await fetchFile(`v1/loras/${lora.id}?format=${format}`);
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: `${name}-${format}.safetensors` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

async function forget() {
  const ids = new Set([person.base.id, person.lora.id]);
  await Promise.all([...ids].map((id) => ask(`v1/loras/${id}`, { method: "DELETE" }).catch((error) => {
    if (error.reason !== "unknown_lora") throw error;
  })));
  startAgain();
}

// -- what the page says ------------------------------------------------------------------------------------------------

const say = (text) => ($("status").textContent = text);

function progress(share) {
  $("progress").hidden = share === null;
  $("progress").setAttribute("aria-valuenow", Math.round(100 * (share ?? 0)));
  $("progress").firstElementChild.style.width = `${100 * (share ?? 0)}%`;
}

function tell(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof Problem)) console.error(error);
  const actions = [];
  const action = (text, act) => {
    const button = make("button", { type: "button", className: "button", textContent: text });
    button.addEventListener("click", () => (calm(), guard(act)()));
    actions.push(button);
  };
  if (error.reason === "several_faces") action("Choose the face", chooseFace);
  else if (!model) action("Try again", learnModel);
  else if (person && !person.base && [413, 415, 422].includes(error.status)) action("Take another photo", startAgain);
  else if (person) action("Draw again", draw);
  $("alert-text").textContent =
    error.reason === "several_faces" ? "The photo shows several faces." : error instanceof Problem ? error.message : "Something went wrong in this page. Load it again.";
  $("alert-actions").replaceChildren(...actions);
  $("alert").hidden = false;
}

const calm = () => ($("alert").hidden = true);

/** An event listener whose errors are told. */
function guard(act) {
  return async (...values) => {
    try {
      await act(...values);
    } catch (error) {
      tell(error);
    }
  };
}

const describe = (seed) => `Drawn: ${$("prompt").value.trim().replace(SUBJECT, person.name)}; seed ${seed}`;
const duration = (seconds) => (seconds >= 5400 ? `${Math.round(seconds / 3600)} hours` : seconds >= 120 ? `${Math.round(seconds / 60)} minutes` : `${Math.round(seconds)} seconds`);

// -- sliders -----------------------------------------------------------------------------------------------------------

/** One for each attribute that the model knows; those beyond the first eight are folded away. */
function addSliders(attributes) {
  $("change").hidden = attributes.length === 0;
  const rows = attributes.map((attribute, i) => {
    const row = make("div", { className: "slider" });
    const input = make("input", { type: "range", id: `slider-${i}`, min: -3, max: 3, step: 0.5, value: 0 });
    input.dataset.attribute = attribute;
    const output = make("output", { htmlFor: input.id });
    row.append(make("label", { htmlFor: input.id, textContent: attribute.replaceAll("_", " ") }), input, output);
    input.addEventListener("input", () => setSlider(input, Number(input.value)));
    input.addEventListener("change", guard(draw));
    setSlider(input, 0);
    return row;
  });
  $("sliders").replaceChildren(...rows.slice(0, SLIDERS));
  $("more-sliders").replaceChildren(...rows.slice(SLIDERS));
  $("more-sliders").parentElement.hidden = rows.length <= SLIDERS;
}

function setSlider(input, strength) {
  input.value = strength;
  const text = strength > 0 ? `+${strength}` : String(strength).replace("-", "−");
  input.nextElementSibling?.replaceChildren(text);
  input.setAttribute("aria-valuetext", strength === 0 ? "as in the photo" : `${text} standard deviations`);
  if (strength === 0) delete strengths[input.dataset.attribute];
  else strengths[input.dataset.attribute] = strength;
}

// -- the start ---------------------------------------------------------------------------------------------------------

const fetchSample = async (button) => choose(await (await fetch(button.dataset.photo)).blob(), button.dataset.name);

function listenToEverything() {
  $("file").addEventListener("change", guard(() => choose($("file").files[0])));
  for (const button of $("samples").querySelectorAll("button")) button.addEventListener("click", guard(() => fetchSample(button)));
  $("again").addEventListener("click", startAgain);
  $("form").addEventListener("submit", guard((event) => (event.preventDefault(), draw())));
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) (event.preventDefault(), $("form").requestSubmit());
  });
  $("prompt").addEventListener("input", () => $("prompt-hint").classList.toggle("wrong", !$("prompt").value.includes(SUBJECT)));
  $("dice").addEventListener("click", guard(() => (($("seed").value = Math.floor(Math.random() * 100_000)), draw())));
  $("reset").addEventListener("click", guard(() => {
    for (const input of $("change").querySelectorAll("input")) setSlider(input, 0);
    return draw();
  }));
  $("forget").addEventListener("click", guard(forget));
  for (const button of document.querySelectorAll("[data-format]")) {
    button.addEventListener("click", guard(() => download(person.lora, button.dataset.format, person.name.toLowerCase().replaceAll(" ", "-"))));
  }
  for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close(""));
  for (const [title, prompt] of Object.entries(IDEAS)) {
    const button = make("button", { type: "button", className: "chip", textContent: title });
    button.addEventListener("click", guard(() => (($("prompt").value = prompt), $("prompt-hint").classList.remove("wrong"), draw())));
    $("ideas").append(button);
  }
  document.addEventListener("paste", guard((event) => {
    const file = [...event.clipboardData.files].find((candidate) => candidate.type.startsWith("image/"));
    return file && choose(file);
  }));
  let inside = 0; // dragenter and dragleave come for every element on the way
  const drag = (step) => (event) => {
    if (event.dataTransfer.types.includes("Files")) document.body.classList.toggle("dragging", (inside += step) > 0);
  };
  document.addEventListener("dragenter", drag(1));
  document.addEventListener("dragleave", drag(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", guard((event) => {
    event.preventDefault();
    inside = 0;
    document.body.classList.remove("dragging");
    return choose(event.dataTransfer.files[0]);
  }));
}

function askForKey() {
  $("key-value").value = "";
  $("key").returnValue = "";
  $("key").showModal();
  return new Promise((resolve) => {
    $("key").addEventListener("close", () => resolve($("key").returnValue === "ok" ? $("key-value").value : ""), { once: true });
  });
}

async function learnModel() {
  model = await ask("v1/model");
  const { limits, defaults, base } = model;
  const counts = [1, 2, 4, 6, 8].filter((count) => count <= limits.max_images);
  $("count").replaceChildren(...counts.map((count) => new Option(count, count, false, count === Math.min(4, counts.at(-1)))));
  $("prompt").maxLength = limits.max_prompt_chars;
  Object.assign($("steps"), { max: limits.max_inference_steps, placeholder: defaults.num_inference_steps });
  Object.assign($("guidance"), { max: limits.max_guidance_scale, placeholder: defaults.guidance_scale });
  $("about").textContent = `Base model: ${base.name}, ${base.image_size} px.${model.licence ? ` Licence of the LoRAs: ${model.licence}.` : ""}`;
  $("pictures").classList.toggle("tiny", base.image_size <= 128);
  addSliders(model.synthesizer.attributes ?? []);
}

$("count").replaceChildren(new Option(4, 4, true, true)); // until the model is known
$("variant").value = crypto.getRandomValues(new Uint16Array(1))[0]; // so that strangers with the same photo share no LoRA
setUp({ ask: askForKey });
const blend = startBlend({ $, person: () => person, base: async (signal) => (person.base ??= (await ask("v1/loras", { body: form(photoSource()), signal })).loras[0]), imageOptions, download, guard, tell });
listenToEverything();
guard(learnModel)();
