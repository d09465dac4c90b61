// From one person to another: the LoRAs on the way, one picture each, drawn together and walked with a slider.

import { ask, form, listen } from "./api.js";
import { prepare } from "./photos.js";
import { blobOf, make, show } from "./pictures.js";

const STEPS = 9;

/** `person()`: the first person; `base(signal)`: their LoRA. Returns {leave}: forget the second person. */
export function startBlend({ $, person, base, imageOptions, download, guard, tell }) {
  let frames = []; // {lora, url} at each position
  let other; // {name, photo: Blob}
  let blending = new AbortController();

  for (const sample of $("samples").querySelectorAll("button")) {
    const button = sample.cloneNode(true);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", guard(async () => start({ name: button.dataset.name, photo: await (await fetch(button.dataset.photo)).blob() }, button)));
    add(button);
  }
  const input = make("input", { type: "file", id: "other-file", accept: "image/*", className: "hidden-visually" });
  const label = make("label", { htmlFor: "other-file", className: "tile", textContent: "Photo" });
  input.addEventListener("change", guard(async () => input.files[0] && start({ name: "the other", photo: await prepare(input.files[0]) })));
  add(input, label);
  $("position").addEventListener("input", showFrame);
  for (const button of document.querySelectorAll("[data-blend-format]")) {
    button.addEventListener("click", guard(() => download(frames[$("position").value].lora, button.dataset.blendFormat, "blend")));
  }

  function add(...elements) {
    const item = make("li");
    item.append(...elements);
    $("others").append(item);
  }

  async function start(chosen, button) {
    leave();
    other = chosen;
    button?.setAttribute("aria-pressed", "true");
    blending = new AbortController();
    const { signal } = blending;
    $("blended").hidden = false;
    $("blend-a").textContent = person().name;
    $("blend-b").textContent = other.name;
    showFrame();
    try {
      say("Finding the way from one face to the other");
      const [first, second] = await Promise.all([
        base(signal),
        ask("v1/loras", { body: form({ photo: other.photo, seed: 0, faces: "largest" }), signal }).then(({ loras }) => loras[0]),
      ]);
      const positions = Array.from({ length: STEPS }, (_, i) => i / (STEPS - 1));
      const { loras } = await ask("v1/interpolations", { body: { a: { lora: first.id }, b: { lora: second.id }, positions }, signal });
      let drawn = 0;
      // From the middle outwards: what the slider shows first is drawn first.
      const order = [...loras.keys()].sort((i, j) => Math.abs(i - (STEPS - 1) / 2) - Math.abs(j - (STEPS - 1) / 2));
      await Promise.all(order.map((i) => drawFrame(loras[i], i, signal, () => say(`${++drawn} of ${STEPS} steps drawn`))));
      say("Move the slider to walk from one to the other.");
    } catch (error) {
      if (signal.aborted) return;
      say("");
      tell(error);
    }
  }

  async function drawFrame(lora, i, signal, whenDone) {
    await listen("v1/images", {
      body: { lora: lora.id, ...numbers(imageOptions()), num_images: 1 },
      signal,
      onEvent(event, data) {
        if (event !== "image" || signal.aborted) return;
        frames[i] = { lora, url: URL.createObjectURL(blobOf(data)) };
        whenDone();
        showFrame();
      },
    });
  }

  function showFrame() {
    const position = Number($("position").value);
    const frame = frames[position];
    const share = Math.round((100 * position) / (STEPS - 1));
    const text = `${100 - share} % ${person().name}, ${share} % ${other.name}`;
    $("position").setAttribute("aria-valuetext", text);
    $("blend-share").textContent = text;
    for (const button of document.querySelectorAll("[data-blend-format]")) button.disabled = !frame;
    if (!frame) return;
    $("blend-picture").alt = `Drawn: ${text}`;
    show($("blend-picture"), frame.url);
  }

  function leave() {
    blending.abort();
    for (const frame of frames) if (frame) URL.revokeObjectURL(frame.url);
    frames = [];
    other = undefined;
    $("blended").hidden = true;
    $("blend-picture").removeAttribute("src");
    $("position").value = (STEPS - 1) / 2;
    for (const button of $("others").querySelectorAll("[aria-pressed]")) button.setAttribute("aria-pressed", "false");
  }

  const say = (text) => ($("blend-status").textContent = text);
  return { leave };
}

/** Settings of a form as JSON wants them: numbers, and without what was left empty. */
function numbers({ prompt, image_seed, num_inference_steps, guidance_scale, negative_prompt }) {
  const given = { prompt, image_seed };
  if (num_inference_steps) given.num_inference_steps = Number(num_inference_steps);
  if (guidance_scale) given.guidance_scale = Number(guidance_scale);
  if (negative_prompt) given.negative_prompt = negative_prompt;
  return given;
}
