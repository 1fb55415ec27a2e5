// Requests as lanes, stages as bars.

import { find, make, table } from "./dom.js";
import * as format from "./format.js";
import { openEntry } from "./entry.js";
import { LIMIT } from "./feed.js";
import { LANES, MEANING, about, lengthNs, name, nanoseconds, spans, way } from "./stages.js";
import * as tip from "./tip.js";

const BAR_PX = 11;

// The lanes of one entry. Bars that lie over each other get rows of their own, the longest first.
export function lanes(entry) {
  const found = spans(entry);
  const longestNs = lengthNs(entry, found);
  const share = (ns) => `${((ns / longestNs) * 100).toFixed(4)}%`;
  const rows = LANES.flatMap(([lane, label]) => {
    const here = found.filter((span) => span.lane === lane).sort((a, b) => b.lengthNs - a.lengthNs);
    if (!here.length) return [];
    const levels = [];
    const bars = here.map((span) => {
      const endNs = span.beginNs + span.lengthNs;
      const free = (level) => level.every((other) => endNs <= other.beginNs || other.beginNs + other.lengthNs <= span.beginNs);
      let level = levels.findIndex(free);
      if (level < 0) level = levels.push([]) - 1;
      levels[level].push(span);
      return { span, level };
    });
    bars.sort((a, b) => a.span.beginNs - b.span.beginNs || b.span.lengthNs - a.span.lengthNs);
    const drawn = bars.map(({ span, level }) => {
      const bar = make("div.bar", {
        role: "gridcell",
        tabindex: "-1",
        "data-stage": span.stage,
        "data-ns": span.lengthNs,
        "aria-label": about(entry, span.stage).join(", "),
      });
      bar.style.left = share(span.beginNs);
      bar.style.width = share(span.lengthNs);
      bar.style.top = `${level * BAR_PX}px`;
      return bar;
    });
    const track = make("div.track", { role: "presentation" }, ...drawn);
    track.style.height = `${levels.length * BAR_PX}px`;
    return [make("div.lane", { role: "presentation", "data-lane": lane }, make("span.lane-name", { "aria-hidden": "true" }, label), track)];
  });
  const picture = make("div.lanes", { role: "presentation" }, ...rows);
  picture.style.setProperty("--length", longestNs);
  return picture;
}

// What a request was, in words.
function headParts(entry) {
  const gain = entry.specialization_gain_ns;
  const went = entry.status === "ok" ? [] : [make("span.bad", {}, entry.status)];
  return [
    make("code", {}, entry.request_id.slice(0, 12)),
    make("span.way", {}, way(entry)),
    ...went,
    entry.shadow_of ? make("span.dim", {}, "run again to test predictions") : "",
    make("span", {}, `${format.count(entry.prompt_tokens)} → ${format.count(entry.completion_tokens)} tokens`),
    make("span", {}, `first ${format.duration(entry.ttft_ns)}`),
    make("span", {}, `all ${format.duration(entry.total_ns)}`),
    gain === null || gain === undefined
      ? ""
      : make(gain < 0 ? "span.bad" : "span.good", {}, `${format.duration(gain, true)} by splitting`),
    entry.regret_ns > 0 ? make("span.bad", {}, `${format.duration(entry.regret_ns)} longer than by the best route known`) : "",
    format.known(entry.parity_kl) ? make("span.dim", {}, `KV checked: KL ${entry.parity_kl.toFixed(4)}`) : "",
  ];
}

// A request's line: what it was, and its lanes. `entries` maps such lines to entries, for tips and dialogs.
export function line(entry, entries) {
  const head = make("div.head", { role: "rowheader", tabindex: "-1" }, ...headParts(entry));
  const row = make("div.request", { role: "row", "data-request-id": entry.request_id }, head, lanes(entry));
  entries.set(row, entry);
  return row;
}

// Arrow keys, hover, tap and click on the lines in `grid`.
export function attend(grid, entries) {
  const rowOf = (target) => target.closest?.(".request");
  const cells = (row) => [row.querySelector(".head"), ...row.querySelectorAll(".bar")];
  const tell = (target) => {
    const row = rowOf(target);
    if (row && target.matches(".bar")) tip.show(target, about(entries.get(row), target.dataset.stage));
    else tip.hide();
  };
  let touched = false;
  grid.addEventListener("pointerdown", (event) => (touched = event.pointerType !== "mouse"));
  grid.addEventListener("pointerover", (event) => tell(event.target));
  grid.addEventListener("pointerleave", tip.hide);
  grid.addEventListener("focusin", (event) => {
    for (const cell of grid.querySelectorAll('[tabindex="0"]')) cell.tabIndex = -1;
    event.target.tabIndex = 0;
    tell(event.target);
  });
  grid.addEventListener("focusout", tip.hide);
  grid.addEventListener("click", (event) => {
    const row = rowOf(event.target);
    // A finger cannot hover: it gets the tip first, and the entry by its line's heading.
    if (row && !(touched && event.target.matches(".bar"))) openEntry(entries.get(row));
    else if (row) tell(event.target);
  });
  grid.addEventListener("keydown", (event) => {
    const row = rowOf(event.target);
    if (!row) return;
    const here = cells(row);
    const place = here.indexOf(event.target);
    const rows = () => [...grid.querySelectorAll(".request:not([hidden])")];
    const go = {
      ArrowRight: () => here[place + 1],
      ArrowLeft: () => here[place - 1],
      ArrowDown: () => cells(rows()[rows().indexOf(row) + 1] ?? row)[0],
      ArrowUp: () => cells(rows()[rows().indexOf(row) - 1] ?? row)[0],
      Home: () => cells(rows()[0])[0],
      End: () => cells(rows().at(-1))[0],
      Enter: () => openEntry(entries.get(row)),
      Escape: tip.hide,
    }[event.key];
    if (!go) return;
    event.preventDefault();
    go()?.focus();
  });
}

// The longest request in `place` is as wide as there is room, the others as they compare.
export function scale(place) {
  let longestNs = 1;
  for (const each of place.querySelectorAll(".lanes")) {
    longestNs = Math.max(longestNs, Number(each.style.getPropertyValue("--length")));
  }
  place.style.setProperty("--longest", longestNs);
}

export class Waterfall {
  #entries = new WeakMap();
  #all = [];
  #paused = false;

  constructor() {
    this.#drawLegend();
    attend(find("requests"), this.#entries);
    find("waterfall-route").addEventListener("change", () => this.#draw());
    find("waterfall-scale").addEventListener("change", () => this.#scale());
    find("waterfall-pause").addEventListener("click", (event) => {
      this.#paused = !this.#paused;
      event.target.setAttribute("aria-pressed", this.#paused);
      event.target.textContent = this.#paused ? "Go on" : "Pause";
      if (!this.#paused) this.#draw();
    });
    find("waterfall-as-table").addEventListener("click", (event) => {
      const asTable = find("requests-table").hidden;
      event.target.setAttribute("aria-pressed", asTable);
      find("requests-table").hidden = !asTable;
      find("requests").hidden = asTable;
      this.#draw();
    });
  }

  // `all` is newest last; `added` are those of it that are new.
  take(all, added) {
    this.#all = all;
    if (this.#paused) return;
    const grid = find("requests");
    if (grid.hidden || added.length > 20) {
      this.#draw();
      return;
    }
    for (const entry of added.filter((entry) => this.#wanted(entry))) grid.prepend(line(entry, this.#entries));
    while (grid.childElementCount > LIMIT) grid.lastElementChild.remove();
    this.#settle();
  }

  // Something was found out about `entry`. Its line stays, and with it the focus.
  renew(entry) {
    const row = [...find("requests").children].find((each) => this.#entries.get(each) === entry);
    row?.querySelector(".head").replaceChildren(...headParts(entry));
  }

  #wanted(entry) {
    const route = find("waterfall-route").value;
    return !route || entry.route === route;
  }

  #draw() {
    const wanted = this.#all.filter((entry) => this.#wanted(entry)).reverse();
    if (find("requests").hidden) {
      find("requests-table").replaceChildren(asTable(wanted));
    } else {
      find("requests").replaceChildren(...wanted.map((entry) => line(entry, this.#entries)));
    }
    this.#settle();
  }

  #settle() {
    const grid = find("requests");
    find("requests-none").hidden = this.#all.length > 0;
    const first = grid.querySelector(".head");
    if (first && !grid.querySelector('[tabindex="0"]')) first.tabIndex = 0;
    this.#scale();
  }

  #scale() {
    const grid = find("requests");
    const shared = find("waterfall-scale").value === "shared";
    grid.dataset.scale = shared ? "shared" : "own";
    scale(grid);
  }

  #drawLegend() {
    const shown = ["queue", "tokenize", "reserve", "prefill", "gather", "wire", "transfer_exposed", "inject", "first_decode", "decode"];
    const items = shown.map((stage) =>
      make("li", { title: MEANING[stage] }, make("span.swatch", { "data-stage": stage, "aria-hidden": "true" }), name(stage)),
    );
    find("legend").replaceChildren(...items);
  }
}

function asTable(entries) {
  const stages = Object.keys(MEANING);
  const heads = ["request", "route", "status", "prompt", "answer", ...stages.map(name), "first token", "end to end", "KV sent"];
  const rows = entries.map((entry) => [
    make("button.link", { type: "button", onclick: () => openEntry(entry) }, entry.request_id.slice(0, 12)),
    way(entry),
    entry.status,
    format.count(entry.prompt_tokens),
    format.count(entry.completion_tokens),
    ...stages.map((stage) => (nanoseconds(entry, stage) ? format.duration(nanoseconds(entry, stage)) : null)),
    format.duration(entry.ttft_ns),
    format.duration(entry.total_ns),
    format.bytes(entry.kv_wire_bytes),
  ]);
  return table(heads, rows, "The last requests, newest first");
}
