// Asks the proxy a question by one route, or by each in turn, and shows how it went.

import { events, json, request } from "./api.js";
import { find, make } from "./dom.js";
import * as format from "./format.js";
import { attend, line, scale } from "./waterfall.js";

const ROUTES = ["split", "gpu", "cpu"];

export class TryIt {
  model = null;
  #stop = null;

  constructor() {
    find("try-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask();
    });
    find("try-stop").addEventListener("click", () => this.#stop?.abort());
  }

  // One after another, so that routes do not take each other's cores.
  async #ask() {
    const chosen = find("try-route").value;
    const routes = chosen === "all" ? ROUTES : [chosen];
    const cards = routes.map((route) => new Answer(route));
    find("answers").replaceChildren(...cards.map((card) => card.element));
    this.#stop = new AbortController();
    this.#busy(true);
    try {
      this.model ??= (await json("/v1/models")).data[0].id;
      for (const card of cards) await card.ask(this.model, this.#stop.signal);
    } catch (error) {
      cards[0].say(error.message);
    } finally {
      this.#busy(false);
    }
  }

  #busy(busy) {
    find("try-send").disabled = busy;
    find("try-stop").hidden = !busy;
  }
}

class Answer {
  #entries = new WeakMap();
  // Read out as a whole when it is complete, and not a token at a time.
  #text = make("div.answer", { role: "log", tabindex: "0", "aria-busy": "true" });
  #state = make("p.dim", { role: "status" }, "waiting for its turn");
  #lanes = make("div.one", { role: "grid" });

  constructor(route) {
    this.route = route;
    const title = make("h3", {}, `by route ${route}`);
    this.#text.setAttribute("aria-label", `Answer by route ${route}`);
    this.#lanes.setAttribute("aria-label", `Where its time went, by route ${route}`);
    this.element = make("article.card", { "data-route": route }, title, this.#text, this.#state, this.#lanes);
    attend(this.#lanes, this.#entries);
  }

  say(text) {
    this.#state.textContent = text;
  }

  // Errors are shown, not thrown: the next route has its turn.
  async ask(model, signal) {
    const headers = { "Content-Type": "application/json", "X-Isthmus-Route": this.route };
    if (find("try-codec").value) headers["X-Isthmus-Codec"] = find("try-codec").value;
    const body = {
      model,
      messages: [{ role: "user", content: find("try-prompt").value }],
      max_tokens: Number(find("try-tokens").value),
      temperature: 0,
      stream: true,
      stream_options: { include_usage: true },
      isthmus: true,
    };
    this.say("asked");
    try {
      const began = performance.now();
      const answer = await request("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
      if (!answer.ok) throw new Error((await answer.json()).error.message);
      let first = null;
      for await (const { data } of events(answer)) {
        if (data === "[DONE]") break;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        const text = chunk.choices[0]?.delta.content;
        if (text) {
          first ??= performance.now() - began;
          this.#text.append(text);
        }
        if (chunk.isthmus) this.#close(chunk.isthmus, first, performance.now() - began);
      }
    } catch (error) {
      this.say(signal.aborted ? "stopped" : error.message);
    } finally {
      this.#text.setAttribute("aria-busy", "false");
    }
  }

  #close(entry, firstMs, allMs) {
    const each = (allMs - firstMs) / Math.max(entry.completion_tokens - 1, 1);
    this.say(`first text after ${format.duration(firstMs * 1e6)}, all after ${format.duration(allMs * 1e6)}, ${format.duration(each * 1e6)} a token, seen from here`);
    const row = line(entry, this.#entries);
    row.querySelector(".head").tabIndex = 0;
    this.#lanes.replaceChildren(row);
    scale(find("answers"));
  }
}
