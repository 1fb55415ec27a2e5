// Whether splitting pays: each request's gain against its cost, the running total, whether the router was right, and the
// measured crossover.

import { LINES, draw } from "./charts.js";
import { find, table } from "./dom.js";
import * as format from "./format.js";
import { grossGainNs, way } from "./stages.js";

const REDRAW_MS = 500;
const S = 1e9;
const MS = 1e6;

export class Worth {
  #all = [];
  #tests = [];
  #totals = null;
  #crossover = null;
  #seen = false;
  #timer = null;

  constructor() {
    addEventListener("resize", () => this.#soon());
  }

  // Requests that were run again to test predictions were nobody's.
  take(all) {
    this.#all = all.filter((entry) => !entry.shadow_of);
    this.#tests = all.filter((entry) => entry.shadow_of);
    this.#soon();
  }

  // Sums over all requests since the ledger began.
  totals(sums) {
    this.#totals = sums;
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
    drawRunning(split, this.#totals);
    find("ways-table").replaceChildren(waysTable(this.#all));
    drawTotals(this.#totals);
    find("router-table").replaceChildren(routerTable([...this.#all, ...this.#tests]));
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

// Between neighbours as NumPy does it; null of nothing.
function quantile(values, share) {
  const sorted = values.filter((value) => format.known(value)).sort((a, b) => a - b);
  if (!sorted.length) return null;
  const place = (sorted.length - 1) * share;
  const below = sorted[Math.floor(place)];
  return below + (sorted[Math.ceil(place)] - below) * (place % 1);
}
const median = (values) => quantile(values, 0.5);

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

// Seconds by way that were gained before the requests that are shown; those that `sums` does not have are no part of it.
export function gainedBefore(split, sums) {
  const before = new Map((sums?.ways ?? []).map((each) => [way(each), (each.gained_ns + each.lost_ns) / S]));
  for (const entry of split) {
    if (!sums || entry.seq > sums.seq || entry.closed_at < sums.since) continue;
    before.set(way(entry), (before.get(way(entry)) ?? 0) - entry.specialization_gain_ns / S);
  }
  return before;
}

function drawRunning(split, sums) {
  const ways = waysOf(split);
  const before = gainedBefore(split, sums);
  const totals = new Map(ways.map((each) => [each, before.get(each) ?? 0]));
  let all = [...before.values()].reduce((a, b) => a + b, 0);
  const columns = [[0], [all], ...[...totals.values()].map((value) => [value])];
  split.forEach((entry, place) => {
    all += entry.specialization_gain_ns / S;
    totals.set(way(entry), totals.get(way(entry)) + entry.specialization_gain_ns / S);
    [place + 1, all, ...totals.values()].forEach((value, column) => columns[column].push(value));
  });
  const seconds = (_, value) => (value === null ? "–" : format.duration(value * S, true));
  const series = ways.map((label, place) => ({ label, variable: LINES[place % LINES.length], value: seconds, points: { show: false } }));
  series.unshift({ label: "in all", variable: "--text", width: 3, value: seconds, points: { show: split.length < 2 } });
  draw(find("running"), { x: { label: "requests split", across: "seconds gained", incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500] }, series, data: columns });
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

function drawTotals(sums) {
  const since = sums?.since ? new Date(sums.since).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" }) : null;
  const requests = (sums?.ways ?? []).reduce((total, each) => total + each.requests, 0);
  find("totals-summary").textContent = since
    ? `All ${format.count(requests)} requests since ${since}, by route and codec`
    : "All requests: none yet";
  const split = (each, ns) => (each.route === "split" ? format.duration(ns, true) : null);
  const rows = (sums?.ways ?? []).map((each) => [
    way(each),
    `${format.count(each.answered)} of ${format.count(each.requests)}`,
    split(each, each.gained_ns),
    split(each, each.lost_ns),
    split(each, each.gained_ns + each.lost_ns),
    format.bytes(each.kv_wire_bytes),
  ]);
  find("totals-table").replaceChildren(table(["route and codec", "answered", "gained", "lost", "net", "KV sent"], rows));
}

// The same quantiles as the panels of Grafana's dashboard.
function routerTable(all) {
  const range = (values) =>
    values.length ? `${format.signedPercent(quantile(values, 0.1))} to ${format.signedPercent(quantile(values, 0.9))}` : null;
  const rows = [...new Set(all.map((entry) => entry.route).filter(Boolean))].sort().map((route) => {
    const here = all.filter((entry) => entry.route === route);
    const first = here.map((entry) => entry.ttft_error).filter(format.known);
    const whole = here.map((entry) => entry.e2e_error).filter(format.known);
    const regrets = here.filter((entry) => format.known(entry.regret_ns)).map(regretShare);
    return [
      route,
      format.count(whole.length),
      format.signedPercent(median(first)),
      range(first),
      format.signedPercent(median(whole)),
      range(whole),
      format.count(regrets.length),
      format.percent(median(regrets)),
      format.percent(quantile(regrets, 0.9)),
    ];
  });
  const heads = ["route", "predictions", "first token, median", "10% to 90%", "end to end, median", "10% to 90%"];
  return table([...heads, "compared", "regret, median", "regret, 90%"], rows);
}

// Over what the best route known took, from the decision to the end.
function regretShare(entry) {
  const servedNs = entry.total_ns - entry.queue_ns - entry.tokenize_ns - entry.route_ns;
  return entry.regret_ns / Math.max(1, servedNs - entry.regret_ns);
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
