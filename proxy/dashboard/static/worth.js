// Whether splitting pays: each request's gain against its cost, the running total, and the measured crossover.

import { LINES, draw } from "./charts.js";
import { find, make, table } from "./dom.js";
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

  take(all) {
    this.#all = all;
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

// `summary.workloads` has for each workload `gain`: by concurrency, the ratio of split to the best whole engine.
function drawCrossover({ command, summary }) {
  const lines = Object.entries(summary.workloads ?? {}).map(([workload, { gain }]) => [workload, gain ?? {}]);
  const at = [...new Set(lines.flatMap(([, gain]) => Object.keys(gain).map(Number)))].sort((a, b) => a - b);
  const verdicts = Object.entries(summary.workloads ?? {}).map(([workload, { verdict }]) => [workload, verdict]);
  const said = typeof summary.verdict === "string" ? `${summary.verdict} ` : "";
  find("crossover-caption").textContent = `${said}Measured by ${command.join(" ")}: split over the best whole engine.`;
  find("crossover-table").replaceChildren(
    table(["workload", "verdict", ...at.map((number) => `${number} at once`)], verdicts.map(([workload, verdict], place) => [
      workload,
      verdict,
      ...at.map((number) => lines[place][1][number]?.ratio?.toFixed(2)),
    ])),
  );
  if (!at.length) {
    find("crossover-chart").replaceChildren(make("p", {}, "It holds no ratios to draw."));
    return;
  }
  const series = lines.map(([label], place) => ({ label, variable: LINES[place % LINES.length], spanGaps: true, points: { show: true } }));
  series.push({ label: "equal", variable: "--text-dim", dash: [4, 4], width: 1, points: { show: false } });
  const data = [at, ...lines.map(([, gain]) => at.map((number) => gain[number]?.ratio ?? null)), at.map(() => 1)];
  draw(find("crossover-chart"), { x: { label: "requests at once", across: "times the best whole engine" }, series, data });
}
