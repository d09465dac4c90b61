// The page: a photo becomes a person (one LoRA), the person is drawn, changed, and taken away as a file.

import { Problem, ask, fetchFile, listen } from "./api.js";
import { startBlend } from "./blend.js";
import { startCamera } from "./camera.js";
import { startCode } from "./code.js";
import { showLikeness } from "./likeness.js";
import { startPeople } from "./people.js";
import { drawable, forgetLoRAs, learnFace, makeLoRA, makeLoRAs, newPerson } from "./person.js";
import { prepare } from "./photos.js";
import { blobOf, make, save, thumbnail, urlOf } from "./pictures.js";
import * as session from "./session.js";
import { SUBJECT, startSettings, toBody } from "./settings.js";
import { startSliders } from "./sliders.js";
import { startStage } from "./stage.js";
import { answerOf, calm, copyText, duration, guard, listenToClose, progress, say, setWays, tell } from "./voice.js";

const $ = (id) => document.getElementById(id);
const UNUSABLE = [413, 415, 422]; // statuses of photos that another one must be taken for
const MARKED = 2; // pictures that a landmark of the likeness is the mean of

let model; // GET /v1/model
let person; // see newPerson; marks: {key, base, nearest}
let shown; // what was drawn last: {person, lora, strengths, settings, similarity}
let drawing = new AbortController();
let choice = 0; // of photos, counted: only the last one counts
const bases = new Map(); // settings of a picture -> promise of the URL of the same without the LoRA

// -- photos ------------------------------------------------------------------------------------------------------------

async function choose(files, name, again) {
  const photos = [...files].filter((file) => !file.type || file.type.startsWith("image/"));
  if (!files.length) return;
  if (!photos.length) throw new Problem({ detail: `${files[0].name || "This"} is not a picture. Choose a photo (JPEG, PNG or WebP).` });
  calm();
  const mine = ++choice;
  const whose = photos.length > 1 ? await answerOf("several") : "one";
  if (mine !== choice) return;
  if (whose === "many") return (leave(), people.start(photos));
  if (whose === "one") await meet(photos, name, again);
}

async function meet(photos, name = "Your person", again = undefined) {
  const mine = newPerson(name, [URL.createObjectURL(photos[0])]);
  const wanted = () => person === mine;
  enter(mine);
  say("Reading the face");
  try {
    const learnt = await learnFace(mine, await Promise.all(photos.map(prepare)), model, wanted, again);
    if (!wanted()) return;
    if (!learnt) return startAgain();
  } catch (error) {
    if (!wanted()) return;
    startAgain();
    return tell(error);
  }
  showPhoto();
  await draw();
}

/** Into the studio with a person, whose LoRA may be there already. */
function enter(next) {
  leave();
  person = next;
  $("studio").hidden = false;
  if (people.any()) $("again").textContent = "Back to the people";
  $("name").textContent = person.name;
  showPhoto();
  sliders.set({});
  tellLikeness();
  ready(false);
  window.scrollTo({ top: 0 });
  $("name").focus({ preventScroll: true });
}

function showPhoto() {
  const [first] = person.photos;
  $("photo").parentElement.hidden = !first;
  if (first) $("photo").src = first;
  $("photo").alt = `The photo: ${person.name}`;
  const left = person.leftOut ? `; ${person.leftOut} of another person left out` : "";
  $("photo-caption").textContent = (person.photos.length > 1 ? `One of ${person.photos.length} photos` : "Photo") + left;
}

/** Away from what is shown, whatever that is. */
function leave() {
  choice++;
  drawing.abort();
  progress(null);
  blend.leave();
  people.hide();
  calm();
  stage.clear();
  for (const url of bases.values()) url.then((made) => made && URL.revokeObjectURL(made));
  bases.clear();
  person = shown = undefined;
  sliders.setScale(1);
  $("start").hidden = $("studio").hidden = true;
  $("again").hidden = false;
  $("again").textContent = "Another person";
  $("file").value = "";
  say("");
}

function startAgain() {
  leave();
  people.leave();
  session.leave();
  $("again").hidden = true;
  $("start").hidden = false;
  $("file").focus();
}

/** Back to an entry of the history, or to what a link names. */
async function open(entry) {
  const known = session.personOf(entry);
  if (!known || known.id !== person?.id) enter(known ? { made: [], of: [], ...known } : { ...newPerson(entry.name), base: entry.lora });
  settings.write({ strength: 1, ...entry.settings });
  sliders.setScale(entry.settings.strength ?? 1);
  sliders.set(entry.strengths);
  await draw();
}

// -- drawing -----------------------------------------------------------------------------------------------------------

async function draw() {
  if (!drawable(person)) return;
  drawing.abort();
  drawing = new AbortController();
  const { signal } = drawing;
  const asked = { person, strengths: sliders.strengths(), settings: settings.read() };
  const count = Number(asked.settings.count);
  stage.wait(count);
  calm();
  progress(0);
  say("Drawing");
  try {
    await remade(asked.person, signal, async () => {
      asked.lora = await loraOf(asked.person, asked.strengths, signal);
      asked.similarity = await drawWith(asked, signal);
    });
    signal.throwIfAborted();
    shown = asked;
    await keep(signal);
    say(count === 1 ? "Your picture is ready" : `Your ${count} pictures are ready`);
    tellLikeness();
    ready(true);
    afterwards(signal, asked);
  } catch (error) {
    if (signal.aborted) return;
    say("");
    tell(error);
  } finally {
    if (!signal.aborted) {
      progress(null);
      guard(stage.settle)();
    }
  }
}

/** Draws into the stage; resolves to the mean likeness of the pictures, or null. */
async function drawWith({ person, lora, settings }, signal) {
  let drawn = 0;
  let similarity = null;
  const count = Number(settings.count);
  await listen("v1/images", {
    body: { ...toBody(settings), lora: lora.id, reference: person.reference ?? undefined },
    signal,
    onWait: (seconds) => say(`The server is busy; asking again in ${Math.ceil(seconds)} s`),
    async onEvent(event, data) {
      signal.throwIfAborted();
      if (event === "progress") progress(data.done / data.total);
      if (event === "done") similarity = data.lora.similarity;
      if (event !== "image") return;
      const url = await urlOf(blobOf(data));
      if (signal.aborted) return URL.revokeObjectURL(url);
      const alt = `Drawn: ${settings.prompt.replace(SUBJECT, person.name)}; seed ${data.seed}`;
      stage.put(data.index, { url, seed: data.seed, similarity: data.similarity, alt, name: `${fileName(person.name)}-${data.seed}.png` });
      say(`${++drawn} of ${count} ${count === 1 ? "picture" : "pictures"} drawn`);
    },
  });
  return similarity;
}

/** The LoRA with these changes of the face. */
async function loraOf(person, strengths, signal) {
  if (!person.base) {
    person.base = await makeLoRA(person, signal);
    $("expires").textContent = `after ${duration(person.base.expires_in)}`;
  }
  if (!Object.keys(strengths).length) return person.base;
  return (await makeLoRAs(person, "v1/edits", { lora: person.base.id, edits: strengths }, signal))[0];
}

/** A LoRA that the server has forgotten is made again, where the face is known. */
async function remade(person, signal, act) {
  try {
    return await act();
  } catch (error) {
    if (signal.aborted || error.reason !== "unknown_lora" || !person.face) throw error;
    person.base = null;
    return act();
  }
}

/** What need not be waited for: landmarks of the likeness, and the blend with the changed face. */
function afterwards(signal, asked) {
  const { strengths, lora } = asked;
  const changed = JSON.stringify([asked.person.base.id, strengths, toBody(asked.settings)]);
  if (changed !== afterwards.last) guard(blend.again)();
  afterwards.last = changed;
  landmarks(signal, asked).catch((error) => error.name === "AbortError" || console.warn(`no landmarks for ${lora.id}: ${error.message}`));
}

async function landmarks(signal, asked) {
  const { num_images, image_seed, lora_scale, ...body } = toBody(asked.settings);
  const key = JSON.stringify(body);
  if (!asked.person.reference || asked.person.marks?.key === key) return;
  const given = { ...body, image_seed, num_images: Math.min(MARKED, num_images), embedding: asked.person.reference, seed: asked.person.seed };
  const { base, nearest } = await ask("v1/likeness", { body: given, signal });
  asked.person.marks = { key, base, nearest };
  if (asked.person === person) tellLikeness();
}

/** The URL of what the seed draws without the LoRA, by the settings of what is shown; undefined where that fails. */
function baseOf(seed) {
  if (!shown) return undefined;
  const { num_images, image_seed, lora_scale, ...same } = toBody(shown.settings);
  const body = { ...same, image_seed: seed, lora_scale: 0, lora: shown.lora.id };
  const key = JSON.stringify({ ...body, lora: "" });
  if (!bases.has(key)) bases.set(key, ask("v1/images", { body }).then(({ images }) => urlOf(blobOf(images[0])), () => void bases.delete(key)));
  return bases.get(key);
}

// -- files, links, memory ----------------------------------------------------------------------------------------------

async function download(lora, format, name) {
  const { blob } = await fetchFile(`v1/loras/${lora.id}?format=${format}`);
  const url = URL.createObjectURL(blob);
  save(url, `${fileName(name)}-${format}.safetensors`);
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

async function forget() {
  const gone = Object.assign(person, { forgotten: true }); // what is being made goes as soon as it is there
  drawing.abort();
  blend.leave();
  await forgetLoRAs(session.lorasOf(gone));
  if (person?.id === gone.id) startAgain();
  session.forget(gone);
  showDrawn();
}

async function keep(signal) {
  const { person: whose, lora, strengths, settings: drawn } = shown;
  const { marks, ...known } = whose;
  const thumb = await thumbnail(stage.first());
  signal.throwIfAborted();
  session.remember(known, { lora, strengths, settings: drawn, thumb, told: drawn.prompt.replace(SUBJECT, whose.name) });
  showDrawn();
}

function showDrawn() {
  $("history").hidden = session.drawn().length === 0;
  $("drawn").replaceChildren(
    ...session.drawn().map((entry) => {
      const link = make("a", { href: entry.link, title: entry.told });
      link.append(make("img", { src: entry.thumb, alt: entry.told, width: 96, height: 96 }));
      link.addEventListener("click", guard((event) => (event.preventDefault(), open(entry))));
      const item = make("li");
      item.append(link);
      return item;
    }),
  );
}

const fileName = (name) => name.toLowerCase().replace(/[^\p{L}\d]+/gu, "-").replace(/^-|-$/g, "") || "person";

// -- what the page says ------------------------------------------------------------------------------------------------

function tellLikeness() {
  $("likeness").hidden = $("likeness-title").hidden = !person.reference && person.base !== null;
  const mine = shown?.person === person ? shown.similarity : undefined;
  showLikeness($("likeness"), { photos: person.own, lora: mine ?? undefined, nearest: person.marks?.nearest, base: person.marks?.base });
}

function ready(whether) {
  for (const button of document.querySelectorAll("[data-format]")) button.disabled = !whether;
  $("forget").disabled = !whether;
  const changed = Object.keys(sliders.strengths()).length > 0;
  $("which").textContent = changed ? "This is the LoRA of the changed face." : "For ComfyUI, A1111 and Forge; or with the names of diffusers.";
  code.tell();
}

/** The ways out of an error: texts of buttons, and what they do. */
function waysOut(error) {
  if (!model) return { "Try again": learnModel };
  if (!person && UNUSABLE.includes(error.status)) return { "Take another photo": () => $("file").click() };
  return drawable(person) ? { "Draw again": draw } : {};
}

// -- the start ---------------------------------------------------------------------------------------------------------

const photoAt = async (address) => (await fetch(address)).blob();

async function takeSample({ dataset }) {
  const mine = ++choice;
  const [photo, again] = await Promise.all([dataset.photo, dataset.again].map(photoAt));
  if (mine === choice) await choose([photo], dataset.name, again);
}

function listenToEverything() {
  $("file").addEventListener("change", guard(() => choose($("file").files)));
  for (const button of $("samples").querySelectorAll("button")) button.addEventListener("click", guard(() => takeSample(button)));
  $("again").addEventListener("click", () => (person && people.any() ? (leave(), people.show()) : startAgain()));
  $("forget").addEventListener("click", guard(forget));
  $("copy-link").addEventListener("click", () => copyText(location.href, $("copy-link")));
  for (const button of document.querySelectorAll("[data-format]")) {
    button.addEventListener("click", guard(() => download(shown.lora, button.dataset.format, person.name)));
  }
  window.addEventListener("hashchange", guard(() => session.linked() && open(session.linked())));
  document.addEventListener("paste", guard((event) => choose([...event.clipboardData.files].filter(({ type }) => type.startsWith("image/")))));
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
    return choose(event.dataTransfer.files);
  }));
}

async function learnModel() {
  model = await ask("v1/model");
  const { base, licence, people: whom } = model;
  settings.learn(model);
  sliders.learn(model.synthesizer.attributes ?? []);
  $("knows").hidden = whom !== "rendered";
  $("knows").textContent = `This server knows rendered people only, at ${base.image_size} px. Photographs of real people are refused.`;
  $("about").textContent = `Base model: ${base.name}, ${base.image_size} px.${licence ? ` Licence of the LoRAs: ${licence}.` : ""}`;
  if (!person && session.linked()) await open(session.linked());
}

const redraw = guard(draw);
setWays(waysOut, () => model?.people === "rendered");
listenToClose();
const stage = startStage({ baseOf, guard });
const sliders = startSliders({ onChange: redraw });
const settings = startSettings({ onDraw: redraw });
const code = startCode({ now: () => ({ ...shown, person, model }), copyText });
const blend = startBlend({ first: () => ({ person, settings: settings.read(), lora: (signal) => loraOf(person, sliders.strengths(), signal) }), model: () => model, take: (next) => (enter(next), draw()), download, guard, tell });
const people = startPeople({ model: () => model, settings: settings.read, open: (next) => (enter(next), draw()), download, guard });
listenToEverything();
showDrawn();
startCamera({ onPhoto: (photo) => choose([photo]), guard });
guard(learnModel)();
