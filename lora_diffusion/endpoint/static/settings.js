// What a picture shows and how it is drawn: the form, its ideas, and what the model does not understand of a prompt.

import { make } from "./pictures.js";

const $ = (id) => document.getElementById(id);
export const SUBJECT = "sks person";
const FIELDS = ["prompt", "seed", "count", "steps", "guidance", "negative", "strength"];
const IDEAS = {
  "On a beach": "a photo of sks person, smiling, beach background",
  "In a forest": "a photo of sks person, neutral, soft daylight, forest background",
  "City at night": "a photo of sks person, slight smile, flash, night lights background",
  "Studio portrait": "a photo of sks person, neutral, studio light, dark studio background",
  "Laughing": "a photo of sks person, laughing, soft daylight, garden background",
  "Surprised": "a photo of sks person, surprised, yellow wall background",
};

/** onDraw: to draw with the settings. Returns {learn(model), read(), write(settings)}. */
export function startSettings({ onDraw }) {
  let words = null; // all that the model knows; null: it knows a language

  $("count").replaceChildren(new Option(4, 4, true, true)); // until the model is known
  $("form").addEventListener("submit", (event) => (event.preventDefault(), onDraw()));
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) (event.preventDefault(), $("form").requestSubmit());
  });
  $("prompt").addEventListener("input", hint);
  $("dice").addEventListener("click", () => (($("seed").value = Math.floor(Math.random() * 100_000)), onDraw()));
  for (const [title, prompt] of Object.entries(IDEAS)) {
    const button = make("button", { type: "button", className: "chip", textContent: title });
    button.addEventListener("click", () => (($("prompt").value = prompt), hint(), onDraw()));
    $("ideas").append(button);
  }
  hint();

  function learn({ base, limits, defaults }) {
    words = base.words && new Set(base.words);
    const counts = [1, 2, 4, 6, 8].filter((count) => count <= limits.max_images);
    const wanted = Number($("count").value);
    $("count").replaceChildren(...counts.map((count) => new Option(count, count, false, count === Math.min(wanted, counts.at(-1)))));
    $("prompt").maxLength = limits.max_prompt_chars;
    Object.assign($("steps"), { max: limits.max_inference_steps, placeholder: defaults.num_inference_steps });
    Object.assign($("guidance"), { max: limits.max_guidance_scale, placeholder: defaults.guidance_scale });
    hint();
  }

  /** The settings now; the person is named in the prompt, if it was not. */
  function read() {
    const prompt = $("prompt").value.trim();
    if (!prompt.includes(SUBJECT)) $("prompt").value = `a photo of ${SUBJECT}${prompt ? `, ${prompt}` : ""}`;
    hint();
    return Object.fromEntries(FIELDS.map((field) => [field, $(field).value.trim()]));
  }

  function write(settings) {
    for (const field of FIELDS) if (settings[field] !== undefined) $(field).value = settings[field];
    hint();
  }

  function hint() {
    const prompt = $("prompt").value;
    const unknown = words ? [...new Set(prompt.toLowerCase().match(/[\p{L}\d]+/gu) ?? [])].filter((word) => !words.has(word)) : [];
    const told = [];
    if (unknown.length) told.push(`This model has not learnt: ${unknown.join(", ")}.`);
    if (!prompt.includes(SUBJECT)) told.push(`“${SUBJECT}” stands for the person; it will be added.`);
    $("prompt-hint").textContent = told.join(" ") || `“${SUBJECT}” stands for the person in the photo.`;
    $("prompt-hint").classList.toggle("wrong", unknown.length > 0);
  }

  return { learn, read, write };
}

/** Settings as the API wants them: numbers, and without what was left empty. */
export function toBody({ prompt, seed, count, steps, guidance, negative, strength }) {
  const body = { prompt, image_seed: Number(seed) || 0, num_images: Number(count) || 1, lora_scale: Number(strength) };
  if (steps) body.num_inference_steps = Number(steps);
  if (guidance) body.guidance_scale = Number(guidance);
  if (negative) body.negative_prompt = negative;
  return body;
}
