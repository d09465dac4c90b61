// What the page says, and asks: status, progress, errors with their ways out, dialogs.

import { Problem, setUp } from "./api.js";
import { make } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const FACELESS = ["no_face", "not_upright", "face_too_small", "face_cut_off", "unfamiliar_face"];
let waysOut = () => ({});
let knowsRendered = () => false;

/** ways(error): texts of buttons and what they do; rendered(): whether the server knows no photographs. */
export function setWays(ways, rendered) {
  [waysOut, knowsRendered] = [ways, rendered];
}

export const say = (text) => ($("status").textContent = text);
export const calm = () => ($("alert").hidden = true);

/** share: 0 to 1; null: nothing is being drawn. */
export function progress(share) {
  $("progress").hidden = share === null;
  $("progress").setAttribute("aria-valuenow", Math.round(100 * (share ?? 0)));
  $("progress").firstElementChild.style.width = `${100 * (share ?? 0)}%`;
}

export function tell(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof Problem)) console.error(error);
  const detail = error instanceof Problem ? error.message : "Something went wrong in this page. Load it again.";
  const knows = knowsRendered() && FACELESS.includes(error.reason) ? " This server knows rendered people only: in a photograph it finds nobody." : "";
  $("alert-text").textContent = detail + knows;
  $("alert-actions").replaceChildren(
    ...Object.entries(waysOut(error)).map(([text, act]) => {
      const button = make("button", { type: "button", className: "button", textContent: text });
      button.addEventListener("click", () => (calm(), guard(act)()));
      return button;
    }),
  );
  $("alert").hidden = false;
}

/** A function whose errors are told. */
export function guard(act) {
  return async (...values) => {
    try {
      return await act(...values);
    } catch (error) {
      tell(error);
    }
  };
}

/** The value of the button that a dialog is closed with, or "". */
export function answerOf(id) {
  $(id).returnValue = "";
  $(id).showModal();
  return new Promise((resolve) => $(id).addEventListener("close", () => resolve($(id).returnValue), { once: true }));
}

export function listenToClose() {
  for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close(""));
  for (const button of $("several").querySelectorAll("[value]")) button.addEventListener("click", () => $("several").close(button.value));
}

export async function copyText(text, button) {
  const before = button.textContent;
  const copied = await navigator.clipboard?.writeText(text).then(() => true, () => false);
  button.textContent = copied ? "Copied" : "The browser does not let it";
  setTimeout(() => (button.textContent = before), 1500);
}

export const duration = (seconds) => (seconds >= 5400 ? `${Math.round(seconds / 3600)} hours` : seconds >= 120 ? `${Math.round(seconds / 60)} minutes` : `${Math.round(seconds)} seconds`);

setUp({
  async ask() {
    $("key-value").value = "";
    return (await answerOf("key")) === "ok" ? $("key-value").value : "";
  },
});
