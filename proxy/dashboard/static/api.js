// Talking to the proxy: the key, JSON, and server-sent events by fetch, because EventSource cannot send a key.

import { find } from "./dom.js";

const STORED = "isthmus-api-key";
let asking = null;
// Whoever gives no key is not asked again, until they press the button.
let refused = false;

const headers = (more = {}) => {
  const key = sessionStorage.getItem(STORED);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
};

// Asks once, however many requests wait for it.
export function askForKey(why = "") {
  asking ??= new Promise((resolve) => {
    const dialog = find("ask-key");
    find("key-wrong").textContent = why;
    find("key-value").value = "";
    dialog.addEventListener(
      "close",
      () => {
        const value = find("key-value").value.trim();
        find("key-value").value = "";
        if (value) sessionStorage.setItem(STORED, value);
        refused = !value;
        find("key").hidden = false;
        asking = null;
        resolve(Boolean(value));
      },
      { once: true },
    );
    if (!dialog.open) dialog.showModal();
  });
  return asking;
}

// As fetch, with the key, for which it asks as long as the proxy wants another one and the user gives one.
export async function request(path, options = {}) {
  for (;;) {
    const sent = sessionStorage.getItem(STORED);
    const answer = await fetch(path, { ...options, headers: headers(options.headers) });
    if (answer.status !== 401) return answer;
    // Somebody may have typed one meanwhile.
    if (sent !== sessionStorage.getItem(STORED)) continue;
    if (refused && !asking) throw new Error("no API key: see the button above");
    if (!(await askForKey(sent ? "The proxy does not know this key." : ""))) throw new Error("no API key");
  }
}

export async function json(path) {
  const answer = await request(path);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

// The events of an answer's body: {event, data, id} as text, by the rules of server-sent events as far as we use them.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const found = { event: "message", data: "", id: null };
        for (const line of block.split("\n")) {
          const colon = line.indexOf(":");
          if (colon < 1) continue;
          const field = line.slice(0, colon);
          const text = line.slice(colon + 1).replace(/^ /, "");
          if (field === "data") found.data += (found.data && "\n") + text;
          else if (field in found) found[field] = text;
        }
        if (found.data) yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
