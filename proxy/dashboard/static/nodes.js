// The nodes as the proxy sees them, every second; those that were there and are gone stay on the page in red.

import { find, make } from "./dom.js";
import * as format from "./format.js";

const FORGET_MS = 10 * 60_000;

export class Nodes {
  #cards = new Map();
  #seenAt = new Map();
  #all = [];
  #capacity = null;

  take(all) {
    this.#all = all;
  }

  // What `isthmus measure link` found: the path between two hosts where it was told of one, else loopback.
  measured(link) {
    const [where, ways] = link?.summary.path ? ["path", link.summary.path] : ["loopback", link?.summary.loopback];
    const rate = (ways?.iperf3 ?? ways?.raw)?.gb_per_s.median;
    this.#capacity = rate ? `${format.bytesPerSecond(rate * 1e9)} (${where})` : null;
  }

  show(view) {
    this.#showCluster(view);
    const now = Date.now();
    for (const [name, worker] of Object.entries(view.workers)) {
      this.#seenAt.set(name, now);
      this.#card(name).replaceChildren(...workerParts(name, worker));
      this.#paint(name, worker.up ? worker.state : "down");
    }
    for (const [name, at] of this.#seenAt) {
      if (name in view.workers) continue;
      this.#paint(name, "gone");
      this.#card(name).querySelector(".state").textContent = "gone";
      if (now - at > FORGET_MS) {
        this.#card(name).remove();
        this.#cards.delete(name);
        this.#seenAt.delete(name);
      }
    }
  }

  // The proxy itself cannot be heard: what is known is old.
  lost() {
    for (const name of this.#cards.keys()) this.#paint(name, "unknown");
  }

  #card(name) {
    if (!this.#cards.has(name)) {
      const card = make("article.card", { "data-worker": name });
      this.#cards.set(name, card);
      find("workers").append(card);
    }
    return this.#cards.get(name);
  }

  #paint(name, state) {
    this.#card(name).dataset.state = state;
  }

  #showCluster(view) {
    const { proxy } = view;
    const prefills = Object.values(view.prefill_nodes).map(prefillCard);
    const self = make(
      "article.card",
      { "data-node": "proxy", "data-state": "up" },
      heading("Proxy", "up"),
      facts([
        ["running", format.count(proxy.running)],
        ["waiting", format.count(proxy.queued)],
      ]),
    );
    const link = make("article.card", { "data-node": "link" }, heading("Link", ""), facts(linkFacts(this.#all, view, this.#capacity)));
    find("cluster").replaceChildren(...prefills, link, self);
  }
}

function prefillCard(prefill) {
  return make(
    "article.card",
    { "data-node": "prefill", "data-state": prefill.state },
    heading("Prefill node", prefill.state),
    facts([
      ["address", prefill.url],
      ["why", prefill.up ? null : prefill.down_reason],
      ["prefill", format.perSecond(prefill.prefill_tokens_per_s)],
      ["power", prefill.power && `${format.watts(prefill.power.watts)} (${prefill.power.of})`],
    ]),
  );
}

function linkFacts(all, view, capacity) {
  const sent = all.filter((entry) => entry.wire_ns > 0);
  const last = sent.at(-1);
  const rates = sent.map((entry) => format.over(entry.kv_wire_bytes, entry.wire_ns));
  return [
    ["last transfer", format.bytesPerSecond(view.link.goodput_bytes_per_s)],
    ["fastest of the last requests", format.bytesPerSecond(rates.length ? Math.max(...rates) : 0)],
    ["measured capacity", capacity],
    ["codec", last?.codec],
  ];
}

function heading(name, state) {
  return make("h4", {}, name, " ", make("span.state", {}, state));
}

function facts(rows) {
  const known = rows.filter(([, value]) => value !== null && value !== undefined && value !== "–" && value !== "");
  return make("dl", {}, ...known.flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, value)]));
}

// A share of something, as a bar that also says itself.
function meter(label, used, of, text) {
  const share = of > 0 ? used / of : 0;
  const bar = make("meter", { min: 0, max: 1, high: 0.9, value: Math.min(share, 1), "aria-label": label });
  return make("div.meter", {}, make("span", {}, label), bar, make("span.value", {}, text));
}

// Counts by reason, in brackets.
function reasons(counts) {
  const said = Object.entries(counts ?? {}).map(([reason, count]) => `${format.count(count)} ${reason}`);
  return said.length > 0 ? ` (${said.join(", ")})` : "";
}

// The power is that of whole packages, whatever else runs there; nothing is said where nothing is known.
function powerFacts(status) {
  if (!format.known(status.package_watts)) return [];
  const all = status.package_watts + (status.dram_watts ?? 0);
  const dram = format.known(status.dram_watts) ? `, ${format.watts(status.dram_watts)} of it DRAM` : "";
  return [
    ["power", `${format.watts(all)}${dram} (${status.power_of})`],
    ["energy for a token", status.decode_tokens_per_s > 0 ? format.joules(all / status.decode_tokens_per_s) : null],
  ];
}

function workerParts(name, worker) {
  const status = worker.status;
  const state = worker.up ? worker.state : "down";
  if (!status) return [heading(name, state), facts([["why", worker.down_reason], ["address", worker.endpoint]])];
  const parts = [
    heading(name, state),
    meter("cells", status.used_cells, status.num_cells, `${format.count(status.used_cells)} of ${format.count(status.num_cells)}`),
    meter("batch", status.running_sequences, status.max_sequences, `${status.running_sequences} of ${status.max_sequences}`),
  ];
  const read = status.step_read_bytes_per_s;
  if (status.memory_bytes_per_s > 0) {
    const text = `${format.bytesPerSecond(read)} of ${format.bytesPerSecond(status.memory_bytes_per_s)}`;
    parts.push(meter("memory bandwidth", read, status.memory_bytes_per_s, text));
  }
  for (const tier of status.tiers ?? []) {
    const text = `${format.bytes(tier.used_bytes)} of ${format.bytes(tier.capacity_bytes)}`;
    parts.push(meter(`kept KV: ${tier.name}`, tier.used_bytes, tier.capacity_bytes, text));
  }
  parts.push(
    facts([
      ["why", worker.up ? null : worker.down_reason],
      ["decode", format.perSecond(status.decode_tokens_per_s)],
      ...powerFacts(status),
      ["own prefill", format.perSecond(status.prefill_tokens_per_s)],
      ["waiting for cells", format.count(status.queued_requests)],
      ["preempted", status.preempted_sequences ? format.count(status.preempted_sequences) : null],
      ["memory on another NUMA node", format.percent(status.remote_memory_fraction)],
      ["kept KV", `${format.bytes(status.retained_bytes)}, ${format.count(status.prefix_hits)} hits, ${format.count(status.reused_tokens)} tokens`],
      ...(status.tiers ?? []).map((tier) => [
        `${tier.name} tier`,
        `${format.count(tier.hits)} hits, ${format.count(tier.evictions)} evictions${reasons(tier.evicted)}, ${format.bytesPerSecond(tier.read_bytes_per_s)}`,
      ]),
      ["guesses accepted", status.drafted_tokens ? format.percent(status.accepted_tokens / status.drafted_tokens) : null],
      ["switched off", Object.entries(worker.distrusted).map(([codec, why]) => `${codec}: ${why}`).join("; ")],
      ["cells hold", worker.welcome?.landing.cell_type],
      ["address", worker.endpoint],
    ]),
  );
  return parts;
}
