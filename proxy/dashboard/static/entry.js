// A ledger entry in full: stages, KV, and what the router predicted next to what happened.

import { find, make, table } from "./dom.js";
import * as format from "./format.js";
import { MEANING, grossGainNs, name, nanoseconds, way } from "./stages.js";

let shown = null;

// Something was found out about `entry`, which may be open.
export function renewEntry(entry) {
  if (shown === entry && find("entry").open) openEntry(entry);
}

export function openEntry(entry) {
  shown = entry;
  find("entry-title").textContent = `${entry.request_id}: ${way(entry)}`;
  const parts = [facts(entry), stagesOf(entry), predictions(entry), attempts(entry), whole(entry)];
  find("entry-body").replaceChildren(...parts.filter(Boolean));
  if (!find("entry").open) find("entry").showModal();
}

function facts(entry) {
  const rows = [
    ["status", entry.status],
    ["why this route", entry.reason],
    ["model", entry.model],
    ["prefill node", entry.prefill_node],
    ["worker", entry.worker],
    ["closed", entry.closed_at],
    ["run again for", entry.shadow_of],
    ["KV checked", format.known(entry.parity_kl) ? `next token's distribution is ${entry.parity_kl.toFixed(4)} nats (KL) from the worker's own` : null],
    ["prompt", `${format.count(entry.prompt_tokens)} tokens, ${format.count(entry.kv_reused_tokens)} of them reused`],
    ["answer", `${format.count(entry.completion_tokens)} tokens`],
    ["time to first token", format.duration(entry.ttft_ns)],
    ["end to end", format.duration(entry.total_ns)],
  ];
  if (entry.kv_raw_bytes) {
    const rate = format.bytesPerSecond(format.over(entry.kv_wire_bytes, entry.wire_ns));
    const share = format.percent(entry.kv_wire_bytes / entry.kv_raw_bytes);
    rows.push(["KV sent", `${format.bytes(entry.kv_wire_bytes)}, ${share} of ${format.bytes(entry.kv_raw_bytes)}, ${rate}`]);
  }
  return make("dl", {}, ...rows.filter(([, value]) => value).flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, value)]));
}

function stagesOf(entry) {
  const rows = Object.keys(MEANING)
    .filter((stage) => nanoseconds(entry, stage))
    .map((stage) => {
      const ns = nanoseconds(entry, stage);
      const cell = make("span", { "data-stage-ns": stage, "data-ns": ns }, format.duration(ns));
      return [name(stage), cell, format.percent(ns / entry.total_ns), MEANING[stage]];
    });
  return make("section.stages", {}, make("h3", {}, "Stages"), table(["stage", "took", "of all", "what"], rows));
}

// `predicted` maps routes to what the router expected of them when it chose (proxy/policy.py).
function predictions(entry) {
  const rows = Object.entries(entry.predicted ?? {}).map(([route, seen]) => {
    const taken = route === entry.route;
    return [
      taken ? `${route}, taken` : route,
      format.duration(seen.ttft_ns),
      taken ? format.duration(entry.ttft_ns) : null,
      format.duration(seen.e2e_ns),
      taken ? format.duration(entry.total_ns) : null,
      format.count(seen.samples),
    ];
  });
  const heads = ["route", "first token, predicted", "it was", "end to end, predicted", "it was", "samples"];
  const parts = [make("h3", {}, "Predicted, and what happened")];
  if (rows.length) parts.push(table(heads, rows));
  if (entry.prefill_alternative_ns) {
    const basis = entry.prefill_alternative_basis ? ` (${entry.prefill_alternative_basis})` : "";
    parts.push(make("p", {}, `The CPU's own prefill would have taken ${format.duration(entry.prefill_alternative_ns)}${basis}.`));
  }
  if (grossGainNs(entry) !== null) {
    parts.push(
      make(
        "p",
        {},
        `Prefill on the other node saved ${format.duration(grossGainNs(entry))}, KV cost ${format.duration(entry.transfer_exposed_ns)}: net `,
        make(entry.specialization_gain_ns < 0 ? "strong.bad" : "strong.good", {}, format.duration(entry.specialization_gain_ns, true)),
        ".",
      ),
    );
  }
  if (entry.regret_ns !== null && entry.regret_ns !== undefined) {
    parts.push(make("p", {}, `The best route known of for this request would have ended it ${format.duration(entry.regret_ns)} sooner.`));
  }
  return parts.length > 1 ? make("section", {}, ...parts) : null;
}

function attempts(entry) {
  if (!entry.attempts || entry.attempts.length < 2) return null;
  const rows = entry.attempts.map((each) => [
    [each.route, each.codec].filter(Boolean).join(" "),
    each.prefill_node,
    each.worker,
    format.count(each.completion_tokens),
    each.error,
  ]);
  return make("section", {}, make("h3", {}, "Attempts"), table(["route", "prefill node", "worker", "tokens", "ended by"], rows));
}

function whole(entry) {
  return make("details", {}, make("summary", {}, "As the ledger has it"), make("pre", {}, JSON.stringify(entry, null, 1)));
}
