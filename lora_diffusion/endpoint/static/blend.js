// From one person to another: the LoRAs on the way, one picture each, drawn together and walked with a slider.

import { listen } from "./api.js";
import { drawable, learnFace, makeLoRA, makeLoRAs, newPerson } from "./person.js";
import { prepare } from "./photos.js";
import { blobOf, make, save, urlOf } from "./pictures.js";
import { toBody } from "./settings.js";

const $ = (id) => document.getElementById(id);
const STEPS = 9;

/**
 * first(): {person, lora: async (signal), settings}; take(person): go on with a person of the way.
 * Returns {again: after the first person has changed, leave: forget the second}.
 */
export function startBlend({ first, model, take, download, guard, tell }) {
  let frames = []; // {lora, url, similarity} at each position
  let other; // a person
  let blending = new AbortController();

  for (const sample of $("samples").querySelectorAll("button")) {
    const button = sample.cloneNode(true);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", guard(() => start(button.dataset.name, async () => (await fetch(button.dataset.photo)).blob(), button)));
    add(button);
  }
  const input = make("input", { type: "file", id: "other-file", accept: "image/*", className: "hidden-visually" });
  const label = make("label", { htmlFor: "other-file", className: "tile", textContent: "Photo" });
  input.addEventListener("change", guard(() => {
    const [photo] = input.files;
    input.value = ""; // the same photo may be chosen again
    return photo && start("the other", () => prepare(photo));
  }));
  add(input, label);
  $("position").addEventListener("input", showFrame);
  $("blend-save").addEventListener("click", () => save(frame().url, "blend.png"));
  $("blend-take").addEventListener("click", guard(() => take(blended())));
  for (const button of document.querySelectorAll("[data-blend-format]")) {
    button.addEventListener("click", guard(() => download(frame().lora, button.dataset.blendFormat, "blend")));
  }

  const frame = () => frames[$("position").value];
  const say = (text) => ($("blend-status").textContent = text);

  function add(...elements) {
    const item = make("li");
    item.append(...elements);
    $("others").append(item);
  }

  /** read(): async, the photo. */
  async function start(name, read, button) {
    leave();
    button?.setAttribute("aria-pressed", "true");
    const mine = (other = newPerson(name));
    const wanted = () => other === mine;
    $("blended").hidden = false;
    $("blend-a").textContent = first().person.name;
    $("blend-b").textContent = other.name;
    showFrame();
    try {
      const learnt = await learnFace(mine, [await read()], model(), wanted);
      if (!wanted()) return;
      if (!learnt) return leave();
    } catch (error) {
      if (!wanted()) return;
      leave();
      return tell(error);
    }
    await draw();
  }

  async function draw() {
    const { person, lora, settings } = first();
    if (!drawable(person)) return; // `again` comes when they are drawn
    blending.abort();
    blending = new AbortController();
    const { signal } = blending;
    try {
      say("Finding the way from one face to the other");
      const [a, b] = await Promise.all([lora(signal), (other.base ??= await makeLoRA(other, signal))]);
      person.made.push(b.id); // of no use but for this blend: forgotten with it
      const positions = Array.from({ length: STEPS }, (_, i) => i / (STEPS - 1));
      const loras = await makeLoRAs(person, "v1/interpolations", { a: { lora: a.id }, b: { lora: b.id }, positions }, signal);
      let drawn = 0;
      // From the middle outwards: what the slider shows first is drawn first.
      const order = [...loras.keys()].sort((i, j) => Math.abs(i - (STEPS - 1) / 2) - Math.abs(j - (STEPS - 1) / 2));
      const options = { ...toBody({ ...settings, count: 1 }), reference: person.reference ?? undefined };
      await Promise.all(order.map((i) => drawFrame(loras[i], i, options, signal, () => say(`${++drawn} of ${STEPS} steps drawn`))));
      signal.throwIfAborted();
      say("Move the slider to walk from one to the other.");
    } catch (error) {
      if (signal.aborted) return;
      say("");
      tell(error);
    }
  }

  async function drawFrame(lora, i, options, signal, whenDone) {
    await listen("v1/images", {
      body: { lora: lora.id, ...options },
      signal,
      async onEvent(event, data) {
        if (event !== "image") return;
        const url = await urlOf(blobOf(data));
        if (signal.aborted) return URL.revokeObjectURL(url);
        if (frames[i]) URL.revokeObjectURL(frames[i].url);
        frames[i] = { lora, url, similarity: data.similarity };
        whenDone();
        showFrame();
      },
    });
  }

  const shares = () => {
    const share = Math.round((100 * $("position").value) / (STEPS - 1));
    return [100 - share, share];
  };

  function showFrame() {
    const [a, b] = shares();
    const text = `${a} % ${first().person.name}, ${b} % ${other.name}`;
    $("position").setAttribute("aria-valuetext", text);
    const similarity = frame()?.similarity ?? null;
    $("blend-share").textContent = text + (similarity === null ? "" : ` · likeness to ${first().person.name} ${similarity.toFixed(2)}`);
    for (const button of $("blended").querySelectorAll("button")) button.disabled = !frame();
    if (!frame()) return;
    $("blend-picture").alt = `Drawn: ${text}`;
    $("blend-picture").src = frame().url;
  }

  /** The person at the slider's place: their LoRA is made already, and drawn faces are compared with the first one's photo. */
  function blended() {
    const { person } = first();
    const [a, b] = shares();
    const { photos, reference } = person;
    return { ...newPerson(`${person.name} ${a} %, ${other.name} ${b} %`, photos), reference, base: frame().lora, of: [person.id, ...person.of] };
  }

  function leave() {
    blending.abort();
    for (const one of frames) if (one) URL.revokeObjectURL(one.url);
    frames = [];
    other = undefined;
    $("blended").hidden = true;
    say("");
    $("blend-picture").removeAttribute("src");
    $("position").value = (STEPS - 1) / 2;
    for (const button of $("others").querySelectorAll("[aria-pressed]")) button.setAttribute("aria-pressed", "false");
  }

  return { again: () => other?.face && draw(), leave };
}
