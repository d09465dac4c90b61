// The pictures: one large, compared with what the base model draws without the LoRA; the others below it; a strip on a phone.

import { make, save } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const END = 100; // of the slider

/** baseOf(seed): async, the URL of the picture that the same seed draws without the LoRA. Returns what the page does with it. */
export function startStage({ baseOf, guard }) {
  let pictures = []; // {url, seed, similarity, alt, name} in the places that are filled
  let chosen = 0;
  let asked = 0; // the base picture that was asked for last

  $("compare").addEventListener("input", wipe);
  $("save").addEventListener("click", () => save(pictures[chosen].url, pictures[chosen].name));
  $("big").addEventListener("load", () => ($("save").textContent = `Save, ${$("big").naturalWidth} px`));
  $("zoom-open").addEventListener("click", () => (enlarge(), $("zoom").showModal()));
  for (const [id, step] of [["zoom-back", -1], ["zoom-on", 1]]) $(id).addEventListener("click", () => turn(step));
  $("zoom").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  });
  $("strip").addEventListener("click", () => $("stage").scrollIntoView());
  new IntersectionObserver(([seen]) => $("strip").classList.toggle("needed", !seen.isIntersecting)).observe($("viewer"));

  /** Places for `count` pictures. What hangs there stays, dimmed, until the new one comes: nothing jumps. */
  function wait(count) {
    while ($("pictures").children.length > count) drop($("pictures").lastElementChild);
    while ($("pictures").children.length < count) $("pictures").append(place());
    for (const item of $("pictures").children) item.classList.add("waiting");
    $("viewer").classList.add("waiting");
    chosen = Math.min(chosen, count - 1);
    mark();
  }

  function place() {
    const item = make("li");
    const button = make("button", { type: "button", disabled: true });
    button.append(make("span", { className: "picture" }));
    button.addEventListener("click", guard(() => choose([...$("pictures").children].indexOf(item))));
    item.append(button, make("span", { className: "small soft number", textContent: "\u00a0" }));
    return item;
  }

  function drop(item) {
    const i = [...$("pictures").children].indexOf(item);
    if (pictures[i]) URL.revokeObjectURL(pictures[i].url);
    pictures.splice(i, 1);
    item.remove();
  }

  function put(i, picture) {
    const item = $("pictures").children[i];
    if (pictures[i]) URL.revokeObjectURL(pictures[i].url);
    pictures[i] = picture;
    item.classList.remove("waiting");
    const button = item.firstElementChild;
    button.disabled = false;
    button.replaceChildren(make("img", { className: "picture", src: picture.url, alt: picture.alt }));
    item.lastElementChild.textContent = scored(picture) ? picture.similarity.toFixed(2) : `seed ${picture.seed}`;
    item.lastElementChild.title = scored(picture) ? "likeness to the photo" : "";
    if (i === chosen) present();
    fillStrip();
  }

  /** All pictures are there, or no more will come: places that are still empty go. */
  function settle() {
    for (const item of [...$("pictures").children].reverse()) {
      const i = [...$("pictures").children].indexOf(item);
      if (!pictures[i]) drop(item);
      item.classList.remove("waiting");
    }
    $("viewer").classList.remove("waiting");
    return pictures.length ? choose(Math.min(chosen, pictures.length - 1)) : undefined;
  }

  async function choose(i) {
    chosen = i;
    present();
    await compare();
  }

  function present() {
    const { url, alt, seed, similarity } = pictures[chosen];
    $("big").src = url;
    $("big").alt = alt;
    $("viewer").classList.remove("waiting");
    $("told").textContent = `seed ${seed}${scored({ similarity }) ? ` · likeness ${similarity.toFixed(2)}` : ""}`;
    for (const id of ["zoom-open", "save"]) $(id).disabled = false;
    mark();
  }

  function mark() {
    for (const [i, item] of [...$("pictures").children].entries()) item.firstElementChild.setAttribute("aria-pressed", i === chosen);
  }

  /** The same seed without the LoRA, beside the picture and below it. */
  async function compare() {
    const mine = ++asked;
    const url = await baseOf(pictures[chosen].seed);
    if (mine !== asked || !url) return;
    for (const id of ["base", "big-base"]) $(id).src = url;
    $("base").alt = $("big-base").alt = "The same prompt and seed, drawn without the LoRA";
    $("big-base").hidden = $("compare").hidden = false;
    wipe();
  }

  function wipe() {
    const share = Number($("compare").value);
    $("big-base").style.clipPath = `inset(0 ${END - share}% 0 0)`;
    $("viewer").style.setProperty("--edge", `${share}%`);
    $("viewer").classList.toggle("compared", share > 0);
    $("compare").setAttribute("aria-valuetext", share === 0 ? "all of it with the LoRA" : `${share} % without the LoRA`);
  }

  function turn(step) {
    const there = pictures.length;
    guard(choose)((chosen + step + there) % there);
    enlarge();
  }

  function enlarge() {
    $("zoom-picture").src = pictures[chosen].url;
    $("zoom-picture").alt = pictures[chosen].alt;
  }

  function fillStrip() {
    $("strip").hidden = false;
    $("strip").replaceChildren(...pictures.filter(Boolean).slice(0, 4).map(({ url }) => make("img", { src: url, alt: "" })));
  }

  function clear() {
    asked++;
    while ($("pictures").lastElementChild) drop($("pictures").lastElementChild);
    for (const id of ["big", "big-base", "base"]) $(id).removeAttribute("src"), ($(id).alt = "");
    $("big-base").hidden = $("compare").hidden = $("strip").hidden = true;
    for (const id of ["zoom-open", "save"]) $(id).disabled = true;
    $("told").textContent = "\u00a0";
    $("compare").value = 0;
    chosen = 0;
    wipe();
  }

  return { wait, put, settle, clear, first: () => pictures[0]?.url };
}

const scored = ({ similarity }) => similarity !== null && similarity !== undefined;
