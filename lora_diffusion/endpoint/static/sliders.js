// Sliders: how strong the LoRA works, and one for each attribute of the face that the model knows.

import { make } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const SHOWN = 8; // those beyond are folded away

/** onChange: after a slider was moved. Returns {learn(attributes), strengths(), set(strengths), setScale(scale)}. */
export function startSliders({ onChange }) {
  const strengths = {}; // attribute -> standard deviations, only those that are not 0

  $("strength").addEventListener("input", tellScale);
  $("strength").addEventListener("change", onChange);
  $("reset").addEventListener("click", () => (set({}), onChange()));
  tellScale();

  function learn(attributes) {
    $("change").hidden = attributes.length === 0;
    const rows = attributes.map((attribute, i) => {
      const row = make("div", { className: "slider" });
      const input = make("input", { type: "range", id: `slider-${i}`, min: -3, max: 3, step: 0.5, value: 0 });
      input.dataset.attribute = attribute;
      row.append(make("label", { htmlFor: input.id, textContent: attribute.replaceAll("_", " ") }), input, make("output", { htmlFor: input.id }));
      input.addEventListener("input", () => setOne(input, Number(input.value)));
      input.addEventListener("change", onChange);
      return row;
    });
    $("sliders").replaceChildren(...rows.slice(0, SHOWN));
    $("more-sliders").replaceChildren(...rows.slice(SHOWN));
    $("more-sliders").parentElement.hidden = rows.length <= SHOWN;
    set(strengths);
  }

  function setOne(input, strength) {
    input.value = strength;
    const text = strength > 0 ? `+${strength}` : String(strength).replace("-", "−");
    input.nextElementSibling.textContent = text;
    input.setAttribute("aria-valuetext", strength === 0 ? "as in the photo" : `${text} standard deviations`);
    if (strength === 0) delete strengths[input.dataset.attribute];
    else strengths[input.dataset.attribute] = strength;
    $("reset").disabled = Object.keys(strengths).length === 0;
  }

  function set(wanted) {
    const given = { ...wanted };
    for (const input of $("change").querySelectorAll("input")) setOne(input, given[input.dataset.attribute] ?? 0);
  }

  function tellScale() {
    const scale = Number($("strength").value);
    $("strength").nextElementSibling.textContent = scale.toFixed(1);
    $("strength").setAttribute("aria-valuetext", scale === 0 ? "the base model alone" : `${scale} of 1, as learned`);
  }

  return { learn, set, strengths: () => ({ ...strengths }), setScale: (scale) => (($("strength").value = scale), tellScale()) };
}
