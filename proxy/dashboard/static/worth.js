// Whether splitting pays: each request's gain against its cost, the running total, and the measured crossover.

import { LINES, draw } from "./charts.js";
import { find, table } from "./dom.js";
import * as format from "./format.js";
import { grossGainNs, way } from "./stages.js";

const REDRAW_MS = 500;
const S = 1e9;
const MS = 1e6;

export class Worth {
  #all = [];
  #crossover = null;
  #seen = false;
  #timer = null;

  constructor() {
    addEventListener("resize", () => this.#soon());
  }

  // Requests that were run again to test predictions were nobody's.
  take(all) {
    this.#all = all.filter((entry) => !entry.shadow_of);
    this.#soon();
  }

  // Charts need to know how wide they are: nothing is drawn where nobody looks.
  seen(seen) {
    this.#seen = seen;
    this.redraw();
  }

  redraw() {
    if (!this.#seen) return;
    const split = this.#all.filter((entry) => grossGainNs(entry) !== null);
    find("verdict").textContent = verdict(this.#all, split);
    drawScatter(split);
    drawRunning(split);
    find("ways-table").replaceChildren(waysTable(this.#all));
    if (this.#crossover) drawCrossover(this.#crossover);
  }

  showCrossover(found) {
    this.#crossover = found;
    find("crossover").hidden = !found;
    this.redraw();
  }

  #soon() {
    this.#timer ??= setTimeout(() => {
      this.#timer = null;
      this.redraw();
    }, REDRAW_MS);
  }
}

const sum = (entries, of) => entries.reduce((total, entry) => total + of(entry), 0);
const waysOf = (entries) => [...new Set(entries.map(way))].sort();

function median(values) {
  const sorted = values.filter((value) => value !== null && value !== undefined).sort((a, b) => a - b);
  if (!sorted.length) return null;
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function verdict(all, split) {
  if (!split.length) return `None of the last ${format.count(all.length)} requests was split with an estimate to compare with.`;
  const netNs = sum(split, (entry) => entry.specialization_gain_ns);
  const lost = split.filter((entry) => entry.specialization_gain_ns < 0).length;
  const won = netNs >= 0 ? "gained" : "lost";
  return (
    `Splitting ${won} ${format.duration(Math.abs(netNs))} over ${format.count(split.length)} of the last ` +
    `${format.count(all.length)} requests; ${format.count(lost)} of them lost by it. The gain is the CPU's own prefill, ` +
    "as estimated, minus prefill and exposed transfer."
  );
}

function drawScatter(split) {
  const byCost = [...split].sort((a, b) => a.transfer_exposed_ns - b.transfer_exposed_ns);
  const costs = byCost.map((entry) => entry.transfer_exposed_ns / MS);
  const ways = waysOf(byCost);
  const points = ways.map((each) => byCost.map((entry) => (way(entry) === each ? grossGainNs(entry) / MS : null)));
  const series = ways.map((label, place) => ({
    label,
    variable: LINES[place % LINES.length],
    paths: () => null,
    points: { show: true },
    value: (_, value) => (value === null ? "–" : format.duration(value * MS)),
  }));
  series.push({ label: "break even", variable: "--text-dim", dash: [4, 4], width: 1, points: { show: false } });
  const x = {
    label: "exposed transfer, ms",
    across: "prefill saved, ms",
    value: (_, value) => (value === null ? "–" : format.duration(value * MS)),
  };
  draw(find("scatter"), { x, series, data: [costs, ...points, costs] });
  const rows = [...split].reverse().map((entry) => [
    entry.request_id.slice(0, 12),
    way(entry),
    format.duration(entry.transfer_exposed_ns),
    format.duration(grossGainNs(entry)),
    format.duration(entry.specialization_gain_ns, true),
  ]);
  find("scatter-table").replaceChildren(
    table(["request", "route and codec", "cost: exposed transfer", "saved: prefill", "net"], rows, "Newest first"),
  );
}

function drawRunning(split) {
  const ways = waysOf(split);
  const totals = new Map(ways.map((each) => [each, 0]));
  let all = 0;
  const columns = [[], [], ...ways.map(() => [])];
  split.forEach((entry, place) => {
    all += entry.specialization_gain_ns / S;
    totals.set(way(entry), totals.get(way(entry)) + entry.specialization_gain_ns / S);
    [place + 1, all, ...totals.values()].forEach((value, column) => columns[column].push(value));
  });
  const seconds = (_, value) => (value === null ? "–" : format.duration(value * S, true));
  const series = ways.map((label, place) => ({ label, variable: LINES[place % LINES.length], value: seconds, points: { show: false } }));
  series.unshift({ label: "in all", variable: "--text", width: 3, value: seconds, points: { show: split.length < 2 } });
  draw(find("running"), { x: { label: "requests split", across: "seconds gained" }, series, data: columns });
}

// The same sums as `isthmus measure ledger`.
function waysTable(all) {
  const rows = waysOf(all).map((each) => {
    const here = all.filter((entry) => way(entry) === each);
    const ok = here.filter((entry) => entry.status === "ok" && !entry.failed_over);
    const gains = here.map((entry) => entry.specialization_gain_ns).filter((gain) => gain !== null && gain !== undefined);
    const gained = gains.filter((gain) => gain > 0).reduce((a, b) => a + b, 0);
    const lost = gains.filter((gain) => gain < 0).reduce((a, b) => a + b, 0);
    const signed = (ns) => (gains.length ? format.duration(ns, true) : null);
    const exposed = ok.map((entry) => entry.transfer_exposed_ns);
    return [
      each,
      `${format.count(ok.length)} of ${format.count(here.length)}`,
      signed(gained),
      signed(lost),
      signed(gained + lost),
      gains.length ? format.duration(median(exposed)) : null,
      format.duration(median(ok.map((entry) => entry.ttft_ns))),
      format.duration(median(ok.map((entry) => entry.total_ns))),
      format.bytes(sum(here, (entry) => entry.kv_wire_bytes)),
    ];
  });
  const heads = ["route and codec", "answered", "gained", "lost", "net", "exposed, median", "first token, median", "end to end, median", "KV sent"];
  return table(heads, rows);
}

// What `isthmus measure crossover` wrote: for each workload, and for one request with longer and longer prompts, `gain`
// maps what grows to the ratio of splitting to the best other way.
function drawCrossover({ command, summary }) {
  find("crossover-caption").textContent = `Splitting over the best other way, tokens/s, as ${command.join(" ")} found it.`;
  const workloads = Object.entries(summary.workloads);
  drawRatios("crossover-chart", "crossover-table", workloads, "requests at once");
  const lengths = summary.prompt_length ? [["one request", summary.prompt_length]] : [];
  drawRatios("lengths-chart", "lengths-table", lengths, "prompt tokens");
}

function drawRatios(chart, numbers, lines, label) {
  const at = [...new Set(lines.flatMap(([, { gain }]) => Object.keys(gain).map(Number)))].sort((a, b) => a - b);
  find(chart).hidden = !at.length;
  const rows = lines.map(([name, { verdict, gain }]) => [name, verdict, ...at.map((each) => gain[each]?.ratio.toFixed(2))]);
  const heads = ["workload", "verdict", ...at.map((each) => `${format.count(each)} ${label}`)];
  find(numbers).replaceChildren(rows.length ? table(heads, rows) : "");
  if (!at.length) return;
  const series = lines.map(([name], place) => ({ label: name, variable: LINES[place % LINES.length], spanGaps: true }));
  series.push({ label: "equal", variable: "--text-dim", dash: [4, 4], width: 1, points: { show: false } });
  const data = [at, ...lines.map(([, { gain }]) => at.map((each) => gain[each]?.ratio ?? null)), at.map(() => 1)];
  draw(find(chart), { x: { label, across: "times the best other way" }, series, data });
}
