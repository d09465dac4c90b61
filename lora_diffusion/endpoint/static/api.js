// The HTTP API (docs/reference/http-api.md): JSON, files and server-sent events, with problems as errors that say what to do.

const RETRIES = 4;
let key = sessionStorage.getItem("api-key") ?? "";
const deletionToken = sessionStorage.getItem("deletion-token") ?? Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
sessionStorage.setItem("deletion-token", deletionToken);
let askForKey = async () => "";

export class Problem extends Error {
  constructor({ detail, reason = "unknown", status = 0 }) {
    super(detail);
    this.reason = reason;
    this.status = status;
  }
}

/** `ask`: async function that resolves to an API key, or to "" if there is none. */
export function setUp({ ask }) {
  askForKey = ask;
}

/** Form data of blobs, several of a name. */
export function form(values) {
  const data = new FormData();
  for (const [name, blobs] of Object.entries(values)) for (const blob of blobs) data.append(name, blob, "photo");
  return data;
}

/** The answer as JSON. Paths are relative, so that the page also works behind a prefix. */
export async function ask(path, options = {}) {
  const response = await send(path, { accept: "application/json", ...options });
  return response.status === 204 ? null : response.json();
}

/** The answer as a file: {blob, name}. */
export async function fetchFile(path, options = {}) {
  const response = await send(path, { accept: "*/*", ...options });
  const name = /filename="([^"]+)"/.exec(response.headers.get("Content-Disposition") ?? "")?.[1];
  return { blob: await response.blob(), name: name ?? "lora.safetensors" };
}

/** Calls onEvent(name, data), which may be async, for each event; resolves after the last one. An event `problem` is thrown. */
export async function listen(path, { onEvent, ...options }) {
  const response = await send(path, { accept: "text/event-stream", ...options });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let finished = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    buffer += value;
    const blocks = buffer.split(/\r?\n\r?\n/);
    buffer = blocks.pop();
    for (const block of blocks) {
      const fields = { event: "message", data: "" };
      for (const line of block.split(/\r?\n/)) {
        const [, name, text] = /^(\w+): ?(.*)$/.exec(line) ?? [];
        if (name in fields) fields[name] = name === "data" ? fields.data + text : text;
      }
      if (!fields.data) continue;
      const data = JSON.parse(fields.data);
      if (fields.event === "problem") throw new Problem(data);
      finished ||= fields.event === "done";
      await onEvent(fields.event, data);
    }
  }
  if (!finished) throw new Problem({ detail: "The connection broke off before all pictures were there. Draw again." });
}

async function send(path, { body, method, accept, signal, onWait }) {
  const json = body && !(body instanceof FormData);
  for (let attempt = 0; ; attempt++) {
    const headers = { Accept: accept, "X-Deletion-Token": deletionToken }; // what this page makes, it may delete
    if (json) headers["Content-Type"] = "application/json";
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      response = await fetch(path, { method: method ?? (body ? "POST" : "GET"), headers, signal, body: json ? JSON.stringify(body) : body });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem({ detail: "The server cannot be reached. Is it running, and are you connected to it?", reason: "unreachable" });
    }
    if (response.ok) return response;
    const problem = await response.json().catch(() => ({ detail: `The server answered ${response.status}. Try again.`, status: response.status }));
    signal?.throwIfAborted();
    if (response.status === 401) {
      key = await askForKey();
      if (!key) throw new Problem(problem);
      sessionStorage.setItem("api-key", key);
    } else if ((response.status === 429 || response.status === 503) && attempt < RETRIES) {
      const seconds = Math.min(30, Number(response.headers.get("Retry-After")) || 1) * (1 + Math.random() / 2);
      onWait?.(seconds);
      await pause(seconds * 1000, signal);
    } else {
      throw new Problem(problem);
    }
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}
