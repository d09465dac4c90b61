// How like the person the drawn faces are: on one scale with what a stranger, the nearest person and the own photos reach.

import { make } from "./pictures.js";

const ROWS = {
  photos: ["Own photos", "Another photo of the person"],
  lora: ["This LoRA", "The pictures that are shown"],
  nearest: ["Nearest in training", "Drawn with the LoRA of the most similar person that the model has learnt"],
  base: ["Without a LoRA", "Drawn by the base model alone"],
};

/** marks: {photos, lora, nearest, base}, cosines; undefined: not known yet, null: there is none. */
export function showLikeness(list, marks) {
  const told = Object.entries(ROWS).filter(([name]) => marks[name] !== null);
  list.replaceChildren(...told.map(([name, [label, title]]) => row(name, label, title, marks[name])));
}

function row(name, label, title, value) {
  const item = make("li", { title });
  item.dataset.mark = name;
  const known = value !== undefined;
  const shown = known ? Math.max(0, value).toFixed(2) : "–";
  const meter = make("span", { className: "meter" });
  const bar = make("span");
  bar.style.width = known ? `${100 * shown}%` : "0";
  meter.append(bar);
  if (known) {
    meter.setAttribute("role", "meter");
    meter.setAttribute("aria-label", label);
    for (const [attribute, number] of [["valuemin", 0], ["valuemax", 1], ["valuenow", shown]]) meter.setAttribute(`aria-${attribute}`, number);
  }
  item.append(make("span", { textContent: label }), meter, make("strong", { className: "number", textContent: shown }));
  return item;
}

/** Mean of unit vectors, not of unit length: the server takes any. */
export function mean(vectors) {
  return vectors[0].map((_, i) => vectors.reduce((sum, vector) => sum + vector[i], 0) / vectors.length);
}

export const cosine = (a, b) => a.reduce((sum, x, k) => sum + x * b[k], 0);

/** Mean cosine over all pairs of unit vectors, or null for fewer than two. */
export function meanCosine(vectors) {
  const cosines = vectors.flatMap((a, i) => vectors.slice(0, i).map((b) => cosine(a, b)));
  return cosines.length ? cosines.reduce((a, b) => a + b) / cosines.length : null;
}
