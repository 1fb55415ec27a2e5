// The stages of a ledger entry, and where they lie in time.

import * as format from "./format.js";

export const LANES = [
  ["proxy", "proxy"],
  ["prefill", "prefill node"],
  ["wire", "wire"],
  ["decode", "decode node"],
];

// In the words of the command's own table (isthmus/ledger_table.py).
export const MEANING = {
  queue: "waited for a free slot",
  tokenize: "chat template and tokenizer, in the proxy",
  route: "choice of route",
  reserve: "cells reserved on the decode worker",
  worker_queue: "waited for cells on the decode worker",
  prefill: "prompt computed, first token known",
  transfer_exposed: "decode stood still for KV",
  first_decode: "first token of the decode worker",
  decode: "all tokens of the answer",
  gather: "KV copied out of vLLM's blocks",
  encode: "KV encoded",
  d2h: "KV copied from the GPU",
  wire: "first frame to last, on the wire",
  decode_frame: "frames checked and decoded",
  inject: "KV written into llama.cpp",
  restore: "KV brought back from a lower tier",
};

// One after another, as the client waits for them.
const IN_TURN = ["queue", "tokenize", "route", "reserve", "prefill", "transfer_exposed", "decode"];
const SENDING = ["gather", "encode", "d2h"];
const RECEIVING = ["decode_frame", "inject"];

export const nanoseconds = (entry, stage) => entry[`${stage}_ns`] || 0;
export const name = (stage) => stage.replace("_", " ");
export const way = (entry) => [entry.route || "no route", entry.codec].filter(Boolean).join(" ");

function laneOf(stage, route) {
  if (stage === "prefill") return route === "cpu" ? "decode" : "prefill";
  if (stage === "decode" || stage === "first_decode") return route === "gpu" ? "prefill" : "decode";
  if (stage === "transfer_exposed" || stage === "wire") return "wire";
  if (SENDING.includes(stage)) return "prefill";
  if (RECEIVING.includes(stage) || stage === "restore" || stage === "worker_queue") return "decode";
  return "proxy";
}

// [{stage, lane, beginNs, lengthNs}], as measurements/ledger_spans.py works them out: what the client waits for follows
// in turn, KV is there when the exposed transfer ends, the senders' work begins with the wire and the receiver's ends
// with it. Stages that took no time are left out.
export function spans(entry) {
  const found = [];
  const add = (stage, beginNs, lengthNs) => {
    if (lengthNs > 0) found.push({ stage, lane: laneOf(stage, entry.route), beginNs: Math.max(beginNs, 0), lengthNs });
  };
  const ends = {};
  let nowNs = 0;
  for (const stage of IN_TURN) {
    add(stage, nowNs, nanoseconds(entry, stage));
    if (stage === "decode") add("first_decode", nowNs, nanoseconds(entry, "first_decode"));
    nowNs += nanoseconds(entry, stage);
    ends[stage] = nowNs;
  }
  const thereNs = ends.transfer_exposed;
  const beganNs = Math.max(thereNs - nanoseconds(entry, "wire"), 0);
  add("worker_queue", ends.reserve - nanoseconds(entry, "worker_queue"), nanoseconds(entry, "worker_queue"));
  add("restore", ends.reserve, nanoseconds(entry, "restore"));
  add("wire", beganNs, nanoseconds(entry, "wire"));
  for (const stage of SENDING) add(stage, beganNs, nanoseconds(entry, stage));
  for (const stage of RECEIVING) add(stage, thereNs - nanoseconds(entry, stage), nanoseconds(entry, stage));
  return found;
}

// How long the picture of an entry is: to its end, or to that of its last stage.
export function lengthNs(entry, found) {
  return Math.max(entry.total_ns, ...found.map((span) => span.beginNs + span.lengthNs), 1);
}

// Lines about a stage: its length, its meaning, and the bytes, codec, rate or tokens behind it.
export function about(entry, stage) {
  const ns = nanoseconds(entry, stage);
  const lines = [`${name(stage)}: ${format.duration(ns)}`, MEANING[stage]];
  const raw = entry.kv_raw_bytes;
  const wire = entry.kv_wire_bytes;
  if ((stage === "wire" || stage === "transfer_exposed") && raw) {
    lines.push(`codec ${entry.codec}: ${format.bytes(wire)} of ${format.bytes(raw)} (${format.percent(wire / raw)})`);
    lines.push(`${format.bytesPerSecond(format.over(wire, entry.wire_ns))} on the wire`);
  } else if ((SENDING.includes(stage) || RECEIVING.includes(stage)) && raw) {
    lines.push(`${format.bytes(raw)}, codec ${entry.codec}: ${format.bytesPerSecond(format.over(raw, ns))}`);
  } else if (stage === "inject") {
    lines.push(`${format.count(entry.kv_reused_tokens)} tokens of kept KV`);
  } else if (stage === "prefill") {
    const known = Math.max(entry.kv_reused_tokens || 0, entry.cached_tokens || 0);
    const computed = Math.max(entry.prompt_tokens - known, 0);
    lines.push(`${format.count(computed)} new tokens of ${format.count(entry.prompt_tokens)}`);
    lines.push(format.perSecond(format.over(computed, ns)));
  } else if (stage === "decode") {
    lines.push(`${format.count(entry.completion_tokens)} tokens`);
    lines.push(format.perSecond(format.over(entry.completion_tokens, ns)));
  } else if (stage === "restore") {
    lines.push(`${format.count(entry.kv_restored_tokens)} tokens`);
  }
  return lines;
}

// What prefill on the other node saved before KV cost anything; null where there was nothing to save.
export function grossGainNs(entry) {
  if (entry.specialization_gain_ns === null || entry.specialization_gain_ns === undefined) return null;
  return entry.specialization_gain_ns + entry.transfer_exposed_ns;
}
